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
    conversation = model.conversation(system="Be brief.")
    first = conversation.ask("what is it", images=[one], **FEW)
    second = conversation.ask("and <ImageHere>, beside <ImageHere>?", images=[two, one], **FEW)
    third = conversation.ask("why", **FEW)
    assert [id(i) for i in encoded] == [id(one), id(two)]
    questions = [with_images("what is it", 1), "and <ImageHere>, beside <ImageHere>?", "why"]
    turns = list(zip(questions, [first, second, None], strict=True))
    prompt = chat_format(model.config, model.tokenizer).render(turns, system="Be brief.")
    assert third == model.generate([[one, two, one]], [prompt], context=2000, **FEW)[0]
    assert [t.answer for t in conversation.turns] == [first, second, third]


def test_stream_retry_undo_reset(model):
    conversation = model.conversation()
    first = conversation.ask("what is it", picture(0), **FEW)
    conversation.undo()
    assert "".join(conversation.stream("what is it", picture(0), **FEW)) == first
    assert [t.answer for t in conversation.turns] == [first]
    assert conversation.retry() == first  # greedy: the seed does not matter
    warm = {"temperature": 2.0, "top_k": 50}
    sampled = [conversation.retry(**warm), *(conversation.retry() for _ in range(3))]
    assert len(set(sampled)) > 1 and len(conversation.turns) == 1
    conversation.reset()
    assert conversation.turns == [] and conversation.ask("what is it", picture(0), **FEW) == first
    assert conversation.ask("and now", None, **FEW) == conversation.retry()


def test_a_closed_stream_keeps_what_was_yielded(model):
    conversation = model.conversation()
    pieces = conversation.stream("what is it", max_new_tokens=40)
    first = next(pieces)
    pieces.close()
    assert [t.answer for t in conversation.turns] == [first.strip()]
    conversation.stream_retry(seed=1).close()
    assert [t.answer for t in conversation.turns] == [first.strip()]
    again = "".join(conversation.stream_retry(max_new_tokens=6))
    assert [t.answer for t in conversation.turns] == [again]


def test_errors_do_not_change_the_conversation(model, tmp_path):
    conversation = model.conversation()
    conversation.ask("what is it", picture(0), **FEW)
    before = list(conversation.turns)
    for text, images, options, message in [
        ("", (), {}, "expected text"),
        ("<ImageHere> <ImageHere>", [picture(1)], {}, "3 <ImageHere> and 2 images"),
        ("x", [tmp_path / "none.png"], {}, "there is no such file"),
        ("x", (), {"temperature": -1}, "temperature -1"),
        ("x", (), {"stop": "###"}, "expected a list"),
        ("x", (), {"max_new_tokens": 3000}, "leaves no room"),
    ]:
        with pytest.raises(UserError, match=message):
            conversation.ask(text, images, **options)
        assert conversation.turns == before
    with pytest.raises(UserError, match="temperature -1"):
        conversation.retry(temperature=-1)
    assert conversation.turns == before
    with pytest.raises(UserError, match="is empty"):
        model.conversation().retry()


def test_a_long_history_is_cut_with_a_warning(model):
    conversation = model.conversation()
    conversation.ask("what is it " * 10, picture(0), **FEW)
    with pytest.warns(UserWarning, match=r"dropped the oldest \d+ of \d+ tokens .* 3 of them of"):
        conversation.ask("and now", context=40, **FEW)
    assert len(conversation.turns) == 2


def test_a_custom_template(model):
    custom = ChatTemplate("Q: {}\n", "A: {};\n")
    conversation = model.conversation(template=custom)
    answer = conversation.ask("what", **FEW)
    assert answer == model.generate(None, ["Q: what\nA: "], stop=[";"], **FEW)[0]
    with pytest.raises(UserError, match="'none' is not known; known are vicuna0"):
        model.conversation(template="none")
    with pytest.raises(UserError, match="user is 'Q'"):
        model.conversation(template=ChatTemplate("Q", "{}"))
