"""`evaluate score`: layouts that are read, and one line for every mistake."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minigpt4_jax.cli import evaluate
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmarks import find, scienceqa
from minigpt4_jax.evaluation.layout import rows_of
from minigpt4_jax.evaluation.metrics.statistics import bootstrap_interval
from minigpt4_jax.evaluation.metrics.vqa_accuracy import official
from minigpt4_jax.evaluation.metrics.vqa_normalizer import normalize

ROWS = [{"image": f"{n}.jpg", "question": "what?", "answer": word} for n, word in enumerate("abc")]


@pytest.fixture
def files(tmp_path):
    """files(rows, predictions): the options of the command."""

    def write(rows, predictions, name="gqa"):
        data, answers = tmp_path / "data.json", tmp_path / "predictions.jsonl"
        data.write_text(rows if isinstance(rows, str) else json.dumps(rows))
        lines = [p if isinstance(p, str) else json.dumps(p) for p in predictions]
        answers.write_text("\n".join(lines))
        return ["score", f"--benchmark={name}", f"--data={data}", f"--predictions={answers}"]

    return write


def answers(*ids):
    return [{"id": i, "answer": "a"} for i in ids]


@pytest.mark.parametrize(
    ("rows", "predictions", "message"),
    [
        (ROWS, answers(0, 2), r"1 id is without an answer \(1\)"),
        (ROWS, answers(0, 1, 2, 2), r"1 id is answered more than once \(2\)"),
        (ROWS, answers(0, 1, 2, 7, 8, 9, 10), r"4 ids are not in the data \(7, 8, 9, ...\)"),
        (ROWS, [], "is empty"),
        (ROWS, ["nonsense"], "line 1: is not JSON"),
        (ROWS, [{"id": 0}], '"answer" is missing'),
        (ROWS, [{"answer": "a"}], '"id" is missing'),
        (ROWS, [{"id": 0, "answer": None}], "null; expected text"),
        (ROWS, [{"id": 0, "answer": 2}, *answers(1, 2)], "expected text"),
        ("", answers(0), "is empty"),
        ("[]", answers(0), "has no rows"),
        ('[{"image": "0.jpg", "question": "?"}]', answers(0), '"answer" is missing'),
    ],
)
def test_bad_files_are_one_line(files, rows, predictions, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(files(rows, predictions))
    assert "\n" not in str(error.value)


def test_wrong_folder_split_and_name(tmp_path, files):
    command = files(ROWS, answers(0, 1, 2))
    for option, message in {
        "--data=/nowhere": "no such file or folder",
        f"--data={tmp_path}": "needs testdev_balanced_questions.json",
        "--split=train": "has one split, testdev",
        "--benchmark=gqua": "did you mean gqa",
        "--json=/nowhere/out.json": "no directory",
    }.items():
        with pytest.raises(UserError, match=message):
            evaluate.main([*command, option])


def test_ids_that_are_twice_in_the_data(tmp_path, files):
    row = {"question_id": "q1", "direct_answers": ["a"]}
    with pytest.raises(UserError, match=r"1 ids of aokvqa are there twice \(q1\)"):
        evaluate.main(files([row, row], [{"id": "q1", "answer": "a"}], "aokvqa"))


def test_annotations_of_another_kind(files, tmp_path):
    refs = [{"img_id": "COCO_train2014_000000000001_0", "sents": ["a", "b"], "bbox": [0, 0, 1, 1]}]
    folder = tmp_path / "refcoco"
    folder.mkdir()
    (folder / "refcoco_val.json").write_text(json.dumps(refs))
    with pytest.raises(UserError, match='"sents" is a list; expected a string'):
        find("refcoco").read(tmp_path, "val")
    with pytest.raises(UserError, match="refcoco_testA"):
        find("refcoco").read(tmp_path, "testA")


def test_files_of_pope_and_their_joined_list_agree(tmp_path):
    row = {
        "question_id": 1,
        "image": "a.jpg",
        "text": "Is there a cat in the image?",
        "label": "yes",
    }
    for name in ("random", "popular", "adversarial"):
        (tmp_path / f"coco_pope_{name}.json").write_text(f"{json.dumps(row)}\n" * 2)
    assert [r.id for r in find("pope").read(tmp_path, "")] == list(range(6))
    with pytest.raises(UserError, match=r"1 ids of pope are there twice \(1\)"):
        rows_of(find("pope"), tmp_path, "random")


POPE = [(name, f"{k}.jpg", label) for name in ("random", "popular", "adversarial")
        for k, label in enumerate(("yes", "no"))]  # fmt: skip


@pytest.fixture
def pope(tmp_path):
    """The three files, and LLaVA's list of all questions in another order."""
    text = "Is there a cat in the image?"
    for name in ("random", "popular", "adversarial"):
        lines = [
            json.dumps({"question_id": n, "image": image, "text": text, "label": label})
            for n, (of, image, label) in enumerate(POPE)
            if of == name
        ]
        (tmp_path / f"coco_pope_{name}.json").write_text("\n".join(lines))
    joined = [
        {"question_id": 100 + n, "category": name, "image": image,
         "text": f"{text}\nAnswer the question using a single word or phrase."}
        for n, (name, image, _) in enumerate(POPE)
    ][::-1]  # fmt: skip

    def write_joined(rows=joined):
        (tmp_path / "llava_pope_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return tmp_path

    write_joined.rows = joined
    return write_joined


def test_the_joined_list_of_pope_is_paired_by_image_and_question(pope):
    rows = find("pope").read(pope(), "")
    assert {row.id: row.truth for row in rows} == {
        100 + n: label for n, (_, _, label) in enumerate(POPE)
    }
    assert {row.question.count("\nAnswer") for row in rows} == {1}


def test_a_joined_list_of_another_version_of_pope(pope):
    other = {**pope.rows[0], "image": "9.jpg"}
    for rows, message in (
        (pope.rows[1:], "has 5 questions, the three files have 1 more, the first in coco_pope_adv"),
        ([other, *pope.rows[1:]], r"line 1: its question is not in coco_pope_adversarial\.json"),
        ([*pope.rows, pope.rows[0]], "line 7: its question is not in"),
    ):
        with pytest.raises(UserError, match=message) as error:
            find("pope").read(pope(rows), "")
        assert "different versions" in str(error.value)


def test_gqa_in_its_own_layout(tmp_path):
    def entry(answer, structural, semantic, group, balanced=True):
        return {"imageId": "n12", "question": "Is it?", "answer": answer, "isBalanced": balanced,
                "types": {"structural": structural, "semantic": semantic},
                "groups": {"global": group}}  # fmt: skip

    questions = {
        "01": entry("yes", "verify", "attr", None),
        "02": entry("red", "query", "attr", "color"),
        "03": entry("red", "query", "attr", "color"),
        "04": entry("cat", "query", "cat", "animal"),
        "05": entry("cat", "query", "cat", "animal", balanced=False),
    }
    (tmp_path / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    rows = find("gqa").read(tmp_path, "")
    assert (rows[0].id, rows[0].images[0], rows[0].truth.answer) == (0, "gqa/images/n12.jpg", "yes")
    result = find("gqa").judge(rows, ["Yes", "red", "blue", "cat", "dog"])
    assert result.score == 60  # the original lowers the answer, and knows no balance
    official = dict(result.official)
    assert official.pop("accuracy") == 60
    # GQA's eval.py: exact, of balanced questions; chi-square ((2 - 1)^2 / 2 * 2 + 0 * 1) / 3 / 100
    assert official.pop("distribution") == pytest.approx(1 / 300)
    assert official == {
        "exact_match": 50, "binary": 0, "open": pytest.approx(200 / 3),
        "per_structural_type": {"verify": 0, "query": pytest.approx(200 / 3)},
        "per_semantic_type": {"attr": pytest.approx(100 / 3), "cat": 100},
    }  # fmt: skip


def test_textvqa_and_its_own_accuracy(files, tmp_path):
    ten = ["Stop."] * 9 + ["no"]
    entry = {"image_id": "x", "question": "?"}
    rows = [entry | {"question_id": 5, "answers": ten}]
    rows += [entry | {"question_id": 6, "answers": ["Stop."] * 10}]
    command = files(
        {"data": rows}, [{"id": 5, "answer": "stop"}, {"id": 6, "answer": "stop"}], "textvqa"
    )
    evaluate.main([*command, f"--json={tmp_path / 'out.json'}"])
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["official"]["accuracy"] == 100  # "Stop." is normalized too
    assert out["score"] == 50  # equal answers are compared as they are


@pytest.mark.parametrize(
    ("answer", "choice"),
    [("B", 1), ("(b)", 1), ("The answer is C.", 2), ("A. cat", 0), ("dog", 1), ("Dog.", 1),
     ("a big dog", None), ("E", None), ("", None)],
)  # fmt: skip
def test_choices_of_scienceqa(answer, choice):
    assert scienceqa.chosen(answer, ["cat", "dog", "cow"]) == choice


def test_scienceqa_with_and_without_images(tmp_path):
    problem = {"question": "?", "choices": ["x", "y"], "answer": 1, "hint": "", "split": "test"}
    problems = {"1": problem | {"image": None}, "2": problem | {"image": "image.png"}}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["2", "1"]}))
    rows = find("scienceqa").read(tmp_path, "")
    assert [row.images[:1] for row in rows] == [("scienceqa/images/test/2/image.png",), ()]
    original = find("scienceqa").judge(rows, ["B", "A"]).original
    assert (original["image_accuracy"], original["text_accuracy"]) == (100, 0)


PIECES = ["a", "the ", "two", "dont", " ", "-", "/", ",", ".", "1", "'", "İ", "ß", "cat"]
TEXT = st.lists(st.sampled_from(PIECES)).map("".join)


@given(TEXT)
@example("1,2-3")
def test_the_normalizer_leaves_no_articles_and_no_number_words(text):
    words = normalize(text).split(" ")
    assert not {"a", "an", "the", "two"} & set(words)
    assert normalize(text) == normalize(text).strip()


@given(st.lists(TEXT, min_size=10, max_size=10), TEXT)
def test_vqa_accuracy_counts_by_thirds(texts, prediction):
    answers = [{"answer": text, "answer_id": n} for n, text in enumerate(texts)]
    accuracy = official(prediction, answers)
    assert 0 <= accuracy <= 1
    assert official(prediction, answers[::-1]) == pytest.approx(accuracy)


def test_vqa_accuracy_without_ids_of_answers():
    # told apart by their fields alone, equal answers do not count for each other
    answers = [{"answer": "cat"}] * 5 + [{"answer": "dog"}] * 5
    assert official("cat", answers) == pytest.approx(0.5)


def test_bootstrap_interval_covers_the_mean():
    values = [0.0, 100.0] * 50
    low, high = bootstrap_interval(values)
    assert 39 < low < 45 < 55 < high < 61
    assert bootstrap_interval([100.0] * 5) == (100.0, 100.0)
