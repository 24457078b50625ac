"""Stop texts: found in the text, however its characters are split into tokens, by every way to generate."""

import dataclasses

import pytest
from helpers import tiny
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minigpt4_jax import GenerationConfig
from minigpt4_jax.inference.decode_state import truncate
from minigpt4_jax.inference.detokenize import TextStream, completion_output, make_stop_check
from minigpt4_jax.inference.preprocess import prepare_prompts
from minigpt4_jax.inference.requests import Completion, Request
from minigpt4_jax.processing.chat_templates import clean_answer, role_names
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


FORMATS = {
    "vicuna": tiny.config(),
    "llama2": tiny.config(qformer=False, chat_template="llama2", end_symbol="</s>"),
    "special token": tiny.config(chat_template="chatml", end_symbol="<|im_end|>"),
    "end of several tokens": tiny.config(chat_template="chatml", end_symbol="</end>"),
    "blip2": dataclasses.replace(
        tiny.config(), chat_template="blip2", end_symbol="\n", image_first=True
    ),
}
PARTS = [
    "Assistant:", "[/INST]", "Ass", "###", "#", "</s>", "<s>", "<", "s>", "<|im", "</end>", "</en", "\n",
    " ", "  ", "é", "🙂", "dog", ".", " .", "'", " ' ", " n't", "User:", "\ufffd",
]  # fmt: skip
ENDS = ["\nUser:", " dog", "é!", "🙂", "\n\n", "Ass", " .", "'", "#d"]


def stream_and_answer(config, ids, stops, chunk):
    """The text of a stream that gets `chunk` tokens at a time, and the answer, as the engine ends it."""
    stop_check = make_stop_check(TOKENIZER, [*stops, config.end_symbol.strip() or "###"])
    stream = TextStream(TOKENIZER, config, Request([1], stop_texts=stops))
    pieces = []
    for n in [*range(chunk, len(ids), chunk), len(ids)]:
        so_far, length = completion(ids[:n]), stop_check(ids[:n])
        if length is not None:
            so_far = truncate(so_far, length)
        finished = length is not None or n == len(ids)
        pieces.append(stream.push(so_far, finished))
        if finished:
            break
    assert stream.text == "".join(pieces)
    return stream.text, completion_output(TOKENIZER, config, so_far, stops).text


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.sampled_from(PARTS), st.booleans()), min_size=1, max_size=8),
    st.lists(st.sampled_from(ENDS), max_size=2, unique=True),
)
@example("vicuna", [("\nUser:", True)], ["\nUser:"])  # white space that begins a stop is not shown
@example("vicuna", [("Assistant:", True), ("dog", True)], [])
@example("llama2", [("[/INST]", True), ("Ass", True)], [])
@example("blip2", [("dog", False), (" '", True), (" .", True)], [])  # joined to the full stop
def test_a_stream_joins_to_the_answer(name, parts, stops):
    """Whatever looks like an end, a role or a space to remove, and however many tokens come at once."""
    config = FORMATS[name]
    ids = [
        i for text, split in parts for i in (spell(text, []) if split else TOKENIZER.encode(text))
    ]
    (text, answer), *others = (stream_and_answer(config, ids, tuple(stops), n) for n in (1, 3, 100))
    assert all(other == (text, answer) for other in others)
    assert clean_answer(config, text) == answer
    if not any(role in text for role in role_names(config)):
        assert text == answer
    assert not text.startswith(role_names(config) or ("\0",))


def test_a_role_name_after_other_text_cannot_be_taken_back():
    ids = spell("one Assistant: two", [])
    assert stream_and_answer(FORMATS["vicuna"], ids, (), 1) == ("one Assistant: two", "two")
    assert stream_and_answer(FORMATS["special token"], ids, (), 1)[1] == "one Assistant: two"


@pytest.mark.parametrize("stop", ["over</s>", "a</s>b", "</s>over", " over</s>", "</s>\nover"])
def test_a_stop_text_with_special_tokens_and_others_is_cut_off(stop):
    """Decoding leaves the special token out, and the rest is no part of the answer."""
    assert streamed_and_whole(TOKENIZER.encode("a dog" + stop), stop) == ("a dog", "a dog")


def streamed_and_whole(ids, stop):
    """The text of a stream of these ids, and the answer."""
    config = FORMATS["special token"]
    stream = TextStream(TOKENIZER, config, Request([1], stop_texts=(stop,)))
    pieces = [stream.push(completion(ids[:n]), n == len(ids)) for n in range(1, len(ids) + 1)]
    output = completion_output(TOKENIZER, config, completion(ids, True), [stop])
    return "".join(pieces), output.text


@pytest.mark.parametrize("after", ["", " and more"])
def test_a_stop_text_with_special_tokens_is_found_however_it_is_spelled(after):
    """In bytes, or with a token that begins before it; what min_new_tokens lets follow is cut off."""
    special, after = TOKENIZER.eos_id, TOKENIZER.encode(after)
    spelled = [*TOKENIZER.encode("a dog"), *spell("over", []), special]
    for stop, ids, expected in (
        ("over</s>", spelled, "a dog"),
        ("g</s>", [*TOKENIZER.encode("a dog"), special], "a do"),
    ):
        assert make_stop_check(TOKENIZER, [stop])([*ids, *after]) == len(ids)
        assert make_stop_check(TOKENIZER, [stop])(ids[:-1]) is None
        assert streamed_and_whole([*ids, *after], stop) == (expected, expected)


@pytest.mark.parametrize("stop", ["\n\n", " \n", "\nUser:", "###", " </s>x"])
def test_what_min_new_tokens_lets_follow_a_stop_text_is_cut_off(stop):
    """Of white space, of several tokens, or with a special token."""
    ids = [*TOKENIZER.encode("a dog"), *spell(stop.split("</s>")[0], [])]
    if "</s>" in stop:
        ids += [TOKENIZER.eos_id, *spell("x", [])]
    assert streamed_and_whole([*ids, *TOKENIZER.encode("more")], stop) == ("a dog", "a dog")


def test_the_end_of_a_word_is_no_stop_text_that_begins_with_a_space():
    ids = [*TOKENIZER.encode("carryover"), TOKENIZER.eos_id]
    assert streamed_and_whole(ids, " over</s>") == ("carryover", "carryover")


@pytest.mark.parametrize(
    ("config", "end"),
    [(FORMATS["llama2"], "###"), (tiny.config(chat_template="chatml", end_symbol="the"), "the")],
    ids=["not its end symbol", "a single token"],
)
def test_what_answers_are_cut_at_also_ends_them(config, end):
    """However it is spelled."""
    (prepared,) = prepare_prompts(TOKENIZER, config, None, ["a"], GenerationConfig())
    ids = spell(f"a{end}b", [])
    assert prepared.request.stop_check(ids) == 1 + len(end)
    assert prepared.request.stop_check(ids[: len(end)]) is None


def test_a_stop_text_does_not_begin_in_the_prompt(model):
    """What the prompt ends with is no part of the answer."""
    prompt = "what is it"
    (output,) = model.generate_details(None, [prompt], max_new_tokens=8)[0]
    stop = prompt[-2:] + output.text[:2]
    (stopped,) = model.generate_details(None, [prompt], max_new_tokens=8, stop=[stop])[0]
    assert stopped.ids == output.ids


def test_min_new_tokens_delays_the_end_at_a_stop_text(model):
    """Whose tokens are not those that are forbidden before. The text is cut there all the same."""
    prompt = "what is it"
    (uncut,) = model.generate_details(None, [prompt], max_new_tokens=24)[0]
    stop = uncut.text[len(uncut.text) // 2 :][:2]
    (short,) = model.generate_details(None, [prompt], max_new_tokens=24, stop=[stop])[0]
    (long,) = model.generate_details(
        None, [prompt], max_new_tokens=24, stop=[stop], min_new_tokens=20
    )[0]
    assert len(short.ids) < 20 and long.ids == uncut.ids[:20]
    assert long.text == short.text == uncut.text.split(stop)[0].strip()
    assert long.finish_reason == "stop"


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
