"""The answers of Model.generate: stop texts, log-probabilities, several per prompt, streams."""

import numpy as np
import pytest
from helpers import tiny

import minigpt4_jax
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.detokenize import completion_output, stream_text
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.requests import Completion, Progress, Request
from minigpt4_jax.inference.stop_sequences import stable_prefix

PROMPTS = ["what is it", "which colour", "a"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    c = tiny.config()
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.normal(0, 0.3, shape) + name.endswith("scale")).astype(np.float32)
        for name, shape in parameter_shapes(c).items()
    }
    files = {p.name: p for p in tiny.TOKENIZER.iterdir()}
    out = tmp_path_factory.mktemp("answers") / "model"
    write_model(out, c, tensors.items(), tokenizer=files)
    return minigpt4_jax.load(out, dtype="float32")


def answers(model, **options):
    return model.generate(None, PROMPTS, **{"max_new_tokens": 24} | options)


def test_a_stop_text_need_not_begin_with_a_token(model):
    uncut = answers(model)
    middle = len(uncut[0]) // 2
    stop = uncut[0][middle : middle + 3]
    assert len(stop) == 3
    cut = answers(model, stop=[stop, "never written"])
    assert cut == [text.split(stop)[0].strip() for text in uncut]
    assert cut[0] != uncut[0]
    details = model.generate_details(None, PROMPTS, max_new_tokens=24, stop=[stop])
    first = details[0][0]
    assert first.finish_reason == "stop"
    assert stop in model.tokenizer.decode(first.ids)
    assert stop not in model.tokenizer.decode(first.ids[:-1])  # and no token more


def test_stops_of_each_prompt(model):
    uncut = [output for (output,) in model.generate_details(None, PROMPTS, max_new_tokens=24)]
    stop_ids = [[uncut[0].ids[5]], [], [uncut[2].ids[7], 3]]
    details = model.generate_details(None, PROMPTS, max_new_tokens=24, stop_ids=stop_ids)
    for (output,), full, stops in zip(details, uncut, stop_ids, strict=True):
        length = min((full.ids.index(i) + 1 for i in stops if i in full.ids), default=24)
        assert output.ids == full.ids[:length]
        assert output.finish_reason == ("stop" if stops else "length")
    assert answers(model, stop_ids=stop_ids[0])[0] == details[0][0].text
    stop = [[uncut[0].text[4:7]], [uncut[1].text[4:7], "never"], []]
    cut = [
        output.text.split(stops[0])[0].strip() if stops else output.text
        for output, stops in zip(uncut, stop, strict=True)
    ]
    assert answers(model, stop=stop) == cut


def test_details(model):
    details = model.generate_details(None, PROMPTS, max_new_tokens=24)
    assert [output.text for (output,) in details] == answers(model)
    for (output,) in details:
        assert output.finish_reason == ("length" if len(output.ids) == 24 else "stop")
        assert len(output.logprobs) == len(output.ids)
        assert output.score == pytest.approx(sum(output.logprobs))
        assert max(output.logprobs) <= 0


def test_pieces_of_a_stream_join_to_the_answer(model):
    uncut = answers(model)
    pieces = list(model.stream(None, PROMPTS[0], max_new_tokens=24))
    assert "".join(pieces) == uncut[0]
    assert len(pieces) > 2
    stop = uncut[0][4:7]
    pieces = list(model.stream(None, PROMPTS[0], max_new_tokens=24, stop=[stop]))
    assert "".join(pieces) == uncut[0].split(stop)[0].strip()


def test_a_spelled_bos_is_removed_from_a_stream_too(model):
    piece = model.tokenizer._model.piece_to_id
    ids = [*model.tokenizer.encode("a"), *map(piece, "<s>"), *model.tokenizer.encode("dog")]
    assert "<s>" in model.tokenizer.decode(ids)
    completions = [Completion(ids[:n], [0.0] * n, False, 0.0) for n in range(1, len(ids) + 1)]
    last = completions[-1]
    steps = [Progress(0, Request([1]), c, finished=c is last) for c in completions]
    streamed = "".join(stream_text(model.tokenizer, model.config, steps))
    assert streamed == completion_output(model.tokenizer, model.config, last, []).text


def test_compat_counts_the_bos_of_the_originals_answers(model):
    def sampling(compat):
        config = GenerationConfig(min_new_tokens=6, compat=compat)
        (request,) = model.prepare_requests(None, ["what is it"], config)
        return request.sampling

    assert (sampling(False).min_new_tokens, sampling(False).prior_token) == (6, -1)
    assert (sampling(True).min_new_tokens, sampling(True).prior_token) == (
        5,
        model.tokenizer.bos_id,
    )
    answers(model, compat=True, repetition_penalty=1.5)


def test_several_answers_of_a_search(model):
    texts = answers(model, num_beams=3, num_return_sequences=2, max_new_tokens=8)
    assert len(texts) == 6
    best = answers(model, num_beams=3, max_new_tokens=8)
    assert texts[::2] == best
    details = model.generate_details(
        None, PROMPTS, num_beams=3, num_return_sequences=2, max_new_tokens=8
    )
    assert all(a.score >= b.score for a, b in details)


def test_stable_prefix():
    assert stable_prefix("a caf\ufffd\ufffd", []) == "a caf"
    assert stable_prefix("a red ca", ["###"]) == "a red ca"
    assert stable_prefix("a red car #", ["###"]) == "a red car"
    assert stable_prefix("a red car ##", ["###", "# #"]) == "a red car"
    assert stable_prefix("stop here", ["here not"]) == "stop"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": [""]}, "stop 0"),
        ({"stop": ["a", 3]}, "stop 1"),
        ({"stop": "###"}, "expected a list"),
        ({"stop": [["a"], ["b"]]}, "2 lists of stop for 3 prompts"),
        ({"stop": [["a"], "b", []]}, "stop 'b': expected a list"),
        ({"stop_ids": 2}, "stop_ids 2: expected a list"),
        ({"stop_ids": ["a"]}, "stop_ids 0 is 'a'"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams 2 with temperature 1.0"),
        ({"num_return_sequences": 2}, "num_return_sequences 2"),
        ({"min_p": 1.5}, "min_p 1.5"),
    ],
)
def test_bad_options_are_named(model, options, message):
    with pytest.raises(UserError, match=message):
        answers(model, **options)


def test_what_a_stream_refuses(model):
    with pytest.raises(UserError, match="num_beams 2"):
        model.stream(None, "what", num_beams=2)
    with pytest.raises(UserError, match="'batch' is not known"):
        model.stream(None, "what", batch=2)
