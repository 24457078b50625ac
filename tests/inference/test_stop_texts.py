"""Stop texts: found in the text, however its characters are split into tokens, by every way to generate."""

import pytest
from helpers import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax import GenerationConfig
from minigpt4_jax.inference.detokenize import TextStream, completion_output, make_stop_check
from minigpt4_jax.inference.requests import Completion, Request
from minigpt4_jax.processing.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer(tiny.TOKENIZER, "sentencepiece")
STOPS = ["</end>", "é!", "dog é", "\n\n", "🙂", "###x"]


def spell(text, lengths):
    """Ids of a text whose pieces of these many characters are encoded one by one, bytes included."""
    ids, lengths = [], iter(lengths)
    while text:
        n = next(lengths, 1)
        ids += [TOKENIZER._model.piece_to_id(f"<0x{byte:02X}>") for byte in text[:n].encode()]
        text = text[n:]
    return ids


def completion(ids, hit_stop=False):
    return Completion(ids, [0.0] * len(ids), hit_stop, 0.0)


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.sampled_from(STOPS), st.text("a dogé🙂<\n", max_size=8), st.text("xé🙂>", max_size=4))
def test_a_stop_text_is_found_however_it_is_spelled(stop, before, after):
    """In bytes, with characters of several bytes: the answer ends with the byte that completes it."""
    text = before + stop + after
    before = text.split(stop)[0]  # which may end earlier than it was put together
    ids = spell("x" + text, [])
    stop_check = make_stop_check(TOKENIZER, [stop])
    length = stop_check(ids)
    assert length == len(spell("x" + before + stop, []))
    assert stop_check(ids[: length - 1]) is None
    config = tiny.config()
    output = completion_output(TOKENIZER, config, completion(ids[:length], True), [stop])
    expected = TOKENIZER.decode(spell("x" + before, [])).strip()
    assert output.text == expected.split("###")[0].strip()
    stream = TextStream(TOKENIZER, config, Request([1], stop_texts=(stop,)))
    pieces = [stream.push(completion(ids[:n]), n == length) for n in range(1, length + 1)]
    assert "".join(pieces) == output.text


def test_a_stop_text_does_not_begin_in_the_prompt(model):
    """What the prompt ends with is no part of the answer."""
    prompt = "what is it"
    (output,) = model.generate_details(None, [prompt], max_new_tokens=8)[0]
    stop = prompt[-2:] + output.text[:2]
    (stopped,) = model.generate_details(None, [prompt], max_new_tokens=8, stop=[stop])[0]
    assert stopped.ids == output.ids


@pytest.mark.parametrize("number", [0, 1])
def test_every_way_to_generate_ends_at_the_same_text(model, number):
    conversation = model.conversation()
    question = ("what is it", "tell me a story")[number]
    prompt = conversation.template.render([(question, None)], system=None, extra_bos=True)
    uncut = model.generate(None, [prompt], max_new_tokens=20, context=2000)[0]
    stop = uncut[len(uncut) // 2 :][:2]
    assert len(stop) == 2
    options = {"max_new_tokens": 20, "context": 2000, "stop": [stop]}
    expected = uncut.split(stop)[0].strip()
    assert model.generate(None, [prompt], **options) == [expected]
    assert "".join(model.stream(None, prompt, **options)) == expected
    assert conversation.ask(question, **options) == expected
    assert "".join(model.conversation().stream(question, **options)) == expected
    prepared = model.prepare_prompts(None, [prompt] * 2, GenerationConfig(**options))
    answers = [output.text for _, (output,) in model.answer_prompts(prepared)]
    assert answers == [expected] * 2
    (searched,) = model.generate(None, [prompt], num_beams=2, **options)
    assert stop not in searched  # cut there, even if the search recognized it by other tokens only
