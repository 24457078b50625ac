"""Conversation: the prompt of the next turn, images encoded once, retry and undo, errors, cuts."""

import pytest
from helpers import tiny
from helpers.model_calls import picture

import minigpt4_jax
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.chat_templates import (
    ChatTemplate,
    chat_format,
    with_images,
)

FEW = {"max_new_tokens": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write_random_model(tmp_path_factory.mktemp("conversation") / "model")
    return minigpt4_jax.load(folder, dtype="float32")


def test_the_prompt_has_all_turns_and_images_are_encoded_once(model, monkeypatch):
    one, two, encoded = picture(0), picture(1), []
    encode = model.visual_tokens
    monkeypatch.setattr(model, "visual_tokens", lambda i: encoded.extend(i) or encode(i))
    talk = model.conversation(system="Be brief.")
    first = talk.ask("what is it", images=[one], **FEW)
    second = talk.ask("and <ImageHere>, beside <ImageHere>?", images=[two, one], **FEW)
    third = talk.ask("why", **FEW)
    assert [id(i) for i in encoded] == [id(one), id(two)]
    questions = [with_images("what is it", 1), "and <ImageHere>, beside <ImageHere>?", "why"]
    turns = list(zip(questions, [first, second, None], strict=True))
    prompt = chat_format(model.config, model.tokenizer).render(turns, system="Be brief.")
    assert third == model.generate([[one, two, one]], [prompt], context=2000, **FEW)[0]
    assert [t.answer for t in talk.turns] == [first, second, third]


def test_stream_retry_undo_reset(model):
    talk = model.conversation()
    first = talk.ask("what is it", picture(0), **FEW)
    talk.undo()
    assert "".join(talk.stream("what is it", picture(0), **FEW)) == first
    assert [t.answer for t in talk.turns] == [first]
    assert talk.retry() == first  # greedy: the seed does not matter
    warm = {"temperature": 2.0, "top_k": 50}
    sampled = [talk.retry(**warm), *(talk.retry() for _ in range(3))]
    assert len(set(sampled)) > 1 and len(talk.turns) == 1
    talk.reset()
    assert talk.turns == [] and talk.ask("what is it", picture(0), **FEW) == first
    assert talk.ask("and now", None, **FEW) == talk.retry()


def test_a_closed_stream_keeps_what_was_yielded(model):
    talk = model.conversation()
    pieces = talk.stream("what is it", max_new_tokens=40)
    first = next(pieces)
    pieces.close()
    assert [t.answer for t in talk.turns] == [first.strip()]
    talk.stream_retry(seed=1).close()
    assert [t.answer for t in talk.turns] == [first.strip()]
    again = "".join(talk.stream_retry(max_new_tokens=6))
    assert [t.answer for t in talk.turns] == [again]


def test_errors_do_not_change_the_conversation(model, tmp_path):
    talk = model.conversation()
    talk.ask("what is it", picture(0), **FEW)
    before = list(talk.turns)
    for text, images, options, message in [
        ("", (), {}, "expected text"),
        ("<ImageHere> <ImageHere>", [picture(1)], {}, "3 <ImageHere> and 2 images"),
        ("x", [tmp_path / "none.png"], {}, "there is no such file"),
        ("x", (), {"temperature": -1}, "temperature -1"),
        ("x", (), {"stop": "###"}, "expected a list"),
        ("x", (), {"max_new_tokens": 3000}, "leaves no room"),
    ]:
        with pytest.raises(UserError, match=message):
            talk.ask(text, images, **options)
        assert talk.turns == before
    with pytest.raises(UserError, match="temperature -1"):
        talk.retry(temperature=-1)
    assert talk.turns == before
    with pytest.raises(UserError, match="is empty"):
        model.conversation().retry()


def test_a_long_history_is_cut_with_a_warning(model):
    talk = model.conversation()
    talk.ask("what is it " * 10, picture(0), **FEW)
    with pytest.warns(UserWarning, match=r"dropped the oldest \d+ of \d+ tokens .* 3 of them of"):
        talk.ask("and now", context=40, **FEW)
    assert len(talk.turns) == 2


def test_a_custom_template(model):
    custom = ChatTemplate("Q: {}\n", "A: {};\n")
    talk = model.conversation(template=custom)
    answer = talk.ask("what", **FEW)
    assert answer == model.generate(None, ["Q: what\nA: "], stop=[";"], **FEW)[0]
    with pytest.raises(UserError, match="'none' is not known; known are vicuna0"):
        model.conversation(template="none")
    with pytest.raises(UserError, match="user is 'Q'"):
        model.conversation(template=ChatTemplate("Q", "{}"))
