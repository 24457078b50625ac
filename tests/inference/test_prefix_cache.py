"""Prefix caching: answers that continue from a conversation's cache equal those without it."""

import numpy as np
import pytest
from helpers import tiny
from helpers.small_engine import VOCAB, P, engine, prompt
from helpers.small_engine import model as small_model
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt4_jax
from minigpt4_jax.config import LoraConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.inference.sampling import SamplingParams, required_stages

# Few combinations of stages, lengths and images, as each is compiled: sampling with the float cache only.
SAMPLING = [SamplingParams(), SamplingParams(temperature=1.5, top_k=20, repetition_penalty=1.3)]
MOST_VISUAL = 2 * P  # visual tokens of a conversation


def share_programs(an_engine, sampling, monkeypatch):
    """Let requests of an engine share programs, whatever their number of images and their sampling is."""
    batch_inputs, stages = an_engine.batch_inputs, required_stages(sampling, VOCAB)

    def with_padded_images(*args):
        inputs = batch_inputs(*args)
        padding = MOST_VISUAL - inputs.visual.shape[1]
        return inputs._replace(visual=np.pad(inputs.visual, [(0, 0), (0, padding), (0, 0)]))

    monkeypatch.setattr(an_engine, "batch_inputs", with_padded_images)
    monkeypatch.setattr(an_engine, "stages", lambda _: stages)


@pytest.mark.parametrize(
    ("window", "stacked", "kind"),
    [(None, False, None), (5, True, None), (None, False, "int8")],
    ids=["float", "window stacked", "int8"],
)
def test_random_conversations_have_the_ids_of_a_full_prefill(window, stacked, kind, monkeypatch):
    """Prompts continue after an answer or a part of it, differ in the middle, have images anywhere, or
    are cut on the left; answers end by a stop check, or their stream is closed early."""
    cached_engine = engine(window, stacked, kind)
    resumed, resume = [], cached_engine._resume
    monkeypatch.setattr(
        cached_engine, "_resume", lambda *a: resumed.append(a[2].tokens.shape) or resume(*a)
    )
    sampling = SAMPLING[:1] if kind or window else SAMPLING
    share_programs(cached_engine, sampling, monkeypatch)

    @settings(max_examples=6, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 10_000))
    def check(seed):
        rng, prefix_cache = np.random.default_rng(seed), PrefixCache()
        tokens, visual = prompt(rng, int(rng.integers(46, 54)), 1)
        for _ in range(5):
            stop_check = (lambda ids: 3 if len(ids) >= 3 else None) if rng.random() < 0.2 else None
            request = Request(
                tokens, visual, 8, sampling[rng.integers(len(sampling))], int(rng.integers(9)),
                stop_check=stop_check,
            )  # fmt: skip
            expected = cached_engine.answer([request])[0][0]
            if rng.random() < 0.3:
                run = cached_engine.run(
                    [request], chunk=2, progress=True, prefix_cache=prefix_cache
                )
                ids = next(run).completion.ids
                run.close()
                assert ids == expected.ids[: len(ids)]
            else:
                completion = cached_engine.answer([request], prefix_cache=prefix_cache)[0][0]
                assert completion.ids == expected.ids
                if not kind:  # an int8 value may round the other way
                    np.testing.assert_allclose(completion.logprobs, expected.logprobs, atol=5e-3)
            length = 8 if rng.random() < 0.5 else rng.integers(0, 9)
            tokens = [*tokens, *expected.ids[:length]]
            if rng.random() < 0.2:
                index = int(rng.integers(len(tokens)))
                tokens[index] = tokens[index] if tokens[index] < 0 else int(rng.integers(1, VOCAB))
            if rng.random() < 0.1:
                begin = 1 + max(i for i, t in enumerate(tokens) if t < 0)  # after all images
                tokens, visual = tokens[min(begin, len(tokens) - 1) :], None
            num_images = (
                int(rng.integers(0, 2)) if visual is None or len(visual) < MOST_VISUAL else 0
            )
            new_tokens, new_visual = prompt(rng, int(rng.integers(1, 14)), num_images)
            tokens = tokens + new_tokens
            parts = [v for v in (visual, new_visual) if v is not None]
            visual = np.concatenate(parts) if parts else None
            if visual is None:
                tokens, visual = prompt(rng, 40, 1)
            if rng.random() < 0.1:
                visual = visual + 1  # other images in the same slots

    check()
    assert len(resumed) > 8
    assert min(t for _, t in resumed) == 32


def test_other_parameters_do_not_use_the_cache():
    an_engine, prefix_cache = Engine(small_model()), PrefixCache()
    rng = np.random.default_rng(0)
    request = Request(*prompt(rng, 50, 1), 8)
    an_engine.answer([request], prefix_cache=prefix_cache)
    an_engine.set_parameters(small_model())
    assert prefix_cache.take(request, an_engine._leaves) is None


def test_a_model_with_lora(tmp_path, monkeypatch):
    lora = LoraConfig(rank=2, targets=("q", "v", "down"))
    model = minigpt4_jax.load(tiny.write_random_model(tmp_path / "m", lora=lora), "float32")
    resumed, resume = [], model.engine._resume
    monkeypatch.setattr(model.engine, "_resume", lambda *a: resumed.append(1) or resume(*a))
    conversation = model.conversation()
    for question in ("what is it", "tell me a story", "why"):
        uncached = model.conversation()
        uncached.turns = list(conversation.turns)
        answer = conversation.ask(question, max_new_tokens=6)
        assert answer and answer == uncached.ask(question, max_new_tokens=6)
    assert resumed


def test_conversations_with_and_without_the_cache(tmp_path, monkeypatch):
    """Questions, images, retries, undo, closed streams, other options, cuts: equal answers."""
    model = minigpt4_jax.load(tiny.write_random_model(tmp_path / "model"), dtype="float32")
    resumed, resume = [], model.engine._resume
    monkeypatch.setattr(model.engine, "_resume", lambda *a: resumed.append(1) or resume(*a))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
    cached, uncached = model.conversation(), model.conversation()

    def both(action):
        uncached._prefix_cache.clear()
        assert action(cached) == action(uncached)
        assert [t.answer for t in cached.turns] == [t.answer for t in uncached.turns]

    def close_stream(conversation):
        pieces = conversation.stream("tell me a story", max_new_tokens=12)
        first = next(pieces)
        pieces.close()
        return first

    few = {"max_new_tokens": 6}
    both(lambda conversation: conversation.ask("what is it", pictures[0], **few))
    both(lambda conversation: conversation.ask("and this", pictures[1], **few))
    both(close_stream)
    both(lambda conversation: conversation.ask("why", temperature=1.0, seed=4, stop=["e"], **few))
    both(lambda conversation: conversation.retry())
    both(lambda conversation: conversation.undo())
    both(lambda conversation: conversation.ask("how", num_beams=2, **few))
    both(lambda conversation: conversation.ask("how", extra_bos=False, **few))
    assert len(resumed) >= 5
    count = len(resumed)
    for conversation in (cached, uncached):
        with pytest.warns(UserWarning, match="dropped the oldest"):
            conversation.ask("and now", context=60, **few)
    assert [t.answer for t in cached.turns] == [t.answer for t in uncached.turns]
    assert len(resumed) == count
    both(lambda conversation: conversation.ask("again", **few))
    both(lambda conversation: conversation.reset())
    both(lambda conversation: conversation.ask("what is it", pictures[0], **few))
