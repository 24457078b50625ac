"""Filters of descriptions, and the rules about a polisher's replies."""

import pytest

from minigpt4_jax.curation.answers import REFUSED, Answer
from minigpt4_jax.curation.filters import FILTERS, FilterLimits, find_fault, repetition
from minigpt4_jax.curation.polish import judge_reply, polish_rows

GOOD = (
    "The image shows a wooden bench in a park. Two people sit on it and look at a lake, and behind them "
    "there are tall trees with yellow leaves. The sky is clear, so it is probably a warm day in autumn."
)
BAD = {
    "apology": [
        GOOD + " I'm sorry, I made a mistake in my last answer.",
        "I apologize for that, the image shows a wooden bench in a park with two people.",
        "As an AI language model I do not know what the bench in this park is made of.",
        "I can\u2019t see the image, but it may show a wooden bench in a park with trees.",
    ],
    "meaningless": [
        GOOD + " ### Human: what is it",
        GOOD + " \ufffd\ufffd",
        GOOD + " !!!!!!",
        "<Img><ImageHere></Img> " + GOOD,
        "The image shows a bench @ # % & * ( ) [ ] { } = + ~ ^ | < > / ; : $ @ # % & *",
        GOOD + " " + "ab" * 20,
        GOOD + " soooooo big",
    ],
    "language": [
        "Das Bild zeigt eine Bank im Park, auf der zwei Menschen sitzen und auf einen See schauen.",
        "L'image montre un banc en bois dans un parc, avec deux personnes qui regardent le lac.",
        "\u8fd9\u5f20\u7167\u7247\u663e\u793a\u516c\u56ed\u91cc\u7684\u6728\u5236\u957f\u6905\uff0c\u4e24\u4e2a"
        "\u4eba\u5750\u5728\u4e0a\u9762\u770b\u6e56\u3002" * 2,
        GOOD + " \u042d\u0442\u043e \u0441\u043a\u0430\u043c\u0435\u0439\u043a\u0430 \u0432 \u043f\u0430"
        "\u0440\u043a\u0435.",
    ],
    "repetition": [
        GOOD + " Two people sit on it. There is a dog. Two people sit on it.",
        "The man is wearing a hat and the man is wearing a hat and the man is wearing a hat in a park.",
    ],
    "short": ["A bench in a park.", ""],
}  # fmt: skip


def test_a_good_text_passes():
    assert find_fault(GOOD, FilterLimits()) is None
    assert (
        find_fault(
            "A caf\u00e9 with 12 tables, 3.5 m wide... It's Zo\u00eb's: \u201cbig\u201d; 20% off!",
            FilterLimits(),
        )
        is None
    )


@pytest.mark.parametrize("name", FILTERS)
def test_each_filter_finds_its_fault_and_can_be_left_out(name):
    for text in BAD[name]:
        assert find_fault(text, FilterLimits()) == name, (name, text)
        assert find_fault(text, FilterLimits(), frozenset(FILTERS)) is None
    alone = BAD[name][0]
    assert find_fault(alone, FilterLimits(), frozenset({name})) is None


def test_limits_are_limits():
    text = "The wooden bench stands in a large public park."
    assert find_fault(text, FilterLimits(min_characters=len(text))) is None
    assert find_fault(text, FilterLimits(min_characters=len(text) + 1)) == "short"
    words = "one two three four five one two three four"
    assert repetition(words) == pytest.approx(1 / 6)  # one of its six 4-grams occurred before
    assert repetition("") == 0


@pytest.mark.parametrize(
    ("reply", "reason", "expected"),
    [
        ("A better text.", "stop", ("A better text.", None)),
        ("The description is Already correct.", "stop", ("text", None)),
        ("It is already correct, except for the repetition.", "stop", ("text", "repetition")),
        (
            "The description is incomplete.",
            "stop",
            ("The description is incomplete.", "incomplete"),
        ),
        ("A text that was cu", "length", ("A text that was cu", "cut")),
        ("", "stop", ("", "empty reply")),
        ("policy", REFUSED, ("text", "refused by the server")),
        ("", "content_filter", ("text", "refused by the server")),
    ],
)
def test_replies_are_judged_as_by_the_authors(reply, reason, expected):
    assert judge_reply("text", Answer(reply, reason)) == expected


def test_removed_rows_keep_their_cause():
    replies = {
        GOOD: Answer("already correct", "stop"),
        "a": Answer(GOOD.replace("bench", "chair"), "stop"),
        "b": Answer("A chair.", "stop"),
    }
    rows = [{"id": str(n), "caption": text} for n, text in enumerate([GOOD, "a", "b", "c"])]
    polished = polish_rows([*rows, {"id": "4", "error": "no image"}], replies.get, FilterLimits())
    assert [row["id"] for row in polished.kept] == ["0", "1"] and polished.unchanged == 1
    assert polished.kept[0] == rows[0]
    assert polished.kept[1]["original"] == "a" and "chair" in polished.kept[1]["caption"]
    assert polished.causes == {"short": 1, "not answered": 1, "not described": 1}
    assert polished.removed[0] == {
        "id": "2",
        "caption": "A chair.",
        "original": "b",
        "cause": "short",
    }
