"""What Model.generate says about its answers: stop texts, log-probabilities, several, in pieces."""

import numpy as np
import pytest
from helpers import tiny

import minigpt4_jax
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.detokenize import generation, pieces
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.inference.requests import Completion
from minigpt4_jax.inference.stop_sequences import certain_part

pytestmark = pytest.mark.usefixtures("quick_compilation")

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


def test_a_stop_text_ends_an_answer_wherever_tokens_begin(model):
    whole = answers(model)
    middle = len(whole[0]) // 2
    stop = whole[0][middle : middle + 3]
    assert len(stop) == 3
    cut = answers(model, stop=[stop, "never written"])
    assert cut == [text.split(stop)[0].strip() for text in whole]
    assert cut[0] != whole[0]
    details = model.generate_details(None, PROMPTS, max_new_tokens=24, stop=[stop])
    first = details[0][0]
    assert first.finish_reason == "stop"
    assert stop in model.tokenizer.decode(first.ids)
    assert stop not in model.tokenizer.decode(first.ids[:-1])  # and no token more


def test_every_row_may_have_stops_of_its_own(model):
    details = [some[0] for some in model.generate_details(None, PROMPTS, max_new_tokens=24)]
    ids = [[details[0].ids[5]], [], [details[2].ids[7], 3]]
    found = [
        some[0] for some in model.generate_details(None, PROMPTS, max_new_tokens=24, stop_ids=ids)
    ]
    for one, whole, ends in zip(found, details, ids, strict=True):
        at = min((whole.ids.index(i) + 1 for i in ends if i in whole.ids), default=24)
        assert one.ids == whole.ids[:at] and one.finish_reason == ("stop" if ends else "length")
    assert answers(model, stop_ids=ids[0])[0] == found[0].text
    stop = [[details[0].text[4:7]], [details[1].text[4:7], "never"], []]
    cut = [
        d.text.split(row[0])[0].strip() if row else d.text
        for d, row in zip(details, stop, strict=True)
    ]
    assert answers(model, stop=stop) == cut


def test_details(model):
    details = model.generate_details(None, PROMPTS, max_new_tokens=24)
    assert [some[0].text for some in details] == answers(model)
    for (one,) in details:
        assert one.finish_reason == ("length" if len(one.ids) == 24 else "stop")
        assert len(one.logprobs) == len(one.ids)
        assert one.score == pytest.approx(sum(one.logprobs))
        assert max(one.logprobs) <= 0


def test_pieces_of_a_stream_make_the_answer(model):
    whole = answers(model)
    shown = list(model.stream(None, PROMPTS[0], max_new_tokens=24))
    assert "".join(shown) == whole[0]
    assert len(shown) > 2
    stop = whole[0][4:7]
    shown = list(model.stream(None, PROMPTS[0], max_new_tokens=24, stop=[stop]))
    assert "".join(shown) == whole[0].split(stop)[0].strip()


def test_a_spelled_bos_is_taken_out_of_a_stream_too(model):
    piece = model.tokenizer._model.piece_to_id
    ids = [*model.tokenizer.encode("a"), *map(piece, "<s>"), *model.tokenizer.encode("dog")]
    assert "<s>" in model.tokenizer.decode(ids)
    grown = [Completion(ids[:n], [0.0] * n, False, 0.0) for n in range(1, len(ids) + 1)]
    progress = [(0, answer, answer is grown[-1]) for answer in grown]
    shown = list(pieces(model.tokenizer, model.config, progress, []))
    assert "".join(shown) == generation(model.tokenizer, model.config, grown[-1], []).text


def test_compat_counts_the_bos_that_the_originals_ids_begin_with(model):
    def requests(**options):
        return model._requests(None, ["what is it"], GenerationConfig.of(options))[0].options

    plain, counted = (requests(min_new_tokens=6, compat=c) for c in (False, True))
    assert (plain.min_new_tokens, plain.before) == (6, -1)
    assert (counted.min_new_tokens, counted.before) == (5, model.tokenizer.bos_id)
    answers(model, compat=True, repetition_penalty=1.5)


def test_several_answers_of_a_search(model):
    found = answers(model, num_beams=3, num_return_sequences=2, max_new_tokens=8)
    assert len(found) == 6
    best = answers(model, num_beams=3, max_new_tokens=8)
    assert found[::2] == best
    details = model.generate_details(
        None, PROMPTS, num_beams=3, num_return_sequences=2, max_new_tokens=8
    )
    assert all(a.score >= b.score for a, b in details)


def test_what_is_certain_of_a_text():
    assert certain_part("a caf\ufffd\ufffd", []) == "a caf"
    assert certain_part("a red ca", ["###"]) == "a red ca"
    assert certain_part("a red car #", ["###"]) == "a red car"
    assert certain_part("a red car ##", ["###", "# #"]) == "a red car"
    assert certain_part("stop here", ["here not"]) == "stop"


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
def test_options_that_make_no_sense(model, options, message):
    with pytest.raises(UserError, match=message):
        answers(model, **options)


def test_a_stream_refuses_what_it_cannot_do(model):
    with pytest.raises(UserError, match="num_beams 2"):
        model.stream(None, "what", num_beams=2)
    with pytest.raises(UserError, match="'batch' is not known"):
        model.stream(None, "what", batch=2)
