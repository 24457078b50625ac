"""A conversation's cache is used again: what follows is equal to what is read anew."""

import numpy as np
import pytest
from helpers import tiny
from helpers.small_engine import VOCAB, engine, prompt
from helpers.small_engine import model as small_model
from hypothesis import given, settings
from hypothesis import strategies as st

import minigpt4_jax
from minigpt4_jax.config import LoraConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.inference.sampling import SamplingParams

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Two sets of stages, few lengths and images: each combination of them is compiled.
OPTIONS = [SamplingParams(), SamplingParams(temperature=1.5, top_k=20, repetition_penalty=1.3)]


@pytest.mark.parametrize(
    ("window", "stacked", "int8"),
    [(None, False, False), (5, True, False), (None, False, True)],
    ids=["float", "window stacked", "int8"],
)
def test_random_dialogues_have_the_ids_of_rows_read_anew(window, stacked, int8, monkeypatch):
    """Prompts go on after an answer or part of it, differ in the middle, have images anywhere, are
    cut on the left; answers end by a rule of the host, or are stopped on the way."""
    runner = engine(window, stacked, int8)
    resumed, resume = [], runner._resume
    monkeypatch.setattr(
        runner, "_resume", lambda *args: resumed.append(args[2].tokens.shape) or resume(*args)
    )

    @settings(max_examples=6, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 10_000))
    def check(seed):
        rng, kept = np.random.default_rng(seed), PrefixCache()
        tokens, visual = prompt(rng, int(rng.integers(30, 50)), 1)
        for _ in range(5):
            halt = (lambda ids: 3 if len(ids) >= 3 else None) if rng.random() < 0.2 else None
            request = Request(
                tokens, visual, 8, OPTIONS[rng.integers(2)], int(rng.integers(9)), halt=halt
            )
            anew = runner.answer([request])[0][0]
            wanted = anew.ids
            if rng.random() < 0.3:
                run = runner.run([request], chunk=2, progress=True, kept=kept)
                _, answer, _ = next(run)
                run.close()
                assert answer.ids == wanted[: len(answer.ids)]
            else:
                answer = runner.answer([request], kept=kept)[0][0]
                assert answer.ids == wanted
                if not int8:  # a level of int8 may round the other way
                    np.testing.assert_allclose(answer.logprobs, anew.logprobs, atol=5e-3)
            tokens = [*tokens, *wanted[: 8 if rng.random() < 0.5 else rng.integers(0, 9)]]
            if rng.random() < 0.2:
                at = int(rng.integers(len(tokens)))
                tokens[at] = tokens[at] if tokens[at] < 0 else int(rng.integers(1, VOCAB))
            if rng.random() < 0.1:
                begin = 1 + max(i for i, t in enumerate(tokens) if t < 0)  # behind all images
                tokens, visual = tokens[min(begin, len(tokens) - 1) :], None
            images = int(rng.integers(0, 2)) if visual is None or len(visual) < 6 else 0
            more, seen = prompt(rng, int(rng.integers(1, 14)), images)
            tokens = tokens + more
            visual = (
                seen
                if visual is None
                else visual
                if seen is None
                else np.concatenate([visual, seen])
            )
            if visual is None:
                tokens, visual = prompt(rng, 40, 1)
            if rng.random() < 0.1:
                visual = visual + 1  # other images in the same slots

    check()
    assert len(resumed) > 8
    assert min(t for _, t in resumed) == 32


def test_other_parameters_read_anew():
    runner, kept = Engine(small_model()), PrefixCache()
    rng = np.random.default_rng(0)
    request = Request(*prompt(rng, 50, 1), 8)
    runner.answer([request], kept=kept)
    runner.set_parameters(small_model())
    assert kept.take(request, runner._leaves) is None


def test_a_model_with_lora(tmp_path, monkeypatch):
    lora = LoraConfig(rank=2, targets=("q", "v", "down"))
    model = minigpt4_jax.load(tiny.write_random_model(tmp_path / "m", lora=lora), "float32")
    resumed, resume = [], model._engine._resume
    monkeypatch.setattr(model._engine, "_resume", lambda *a: resumed.append(1) or resume(*a))
    talk = model.conversation()
    for question in ("what is it", "tell me a story", "why"):
        anew = model.conversation()
        anew.turns = list(talk.turns)
        answer = talk.ask(question, max_new_tokens=6)
        assert answer and answer == anew.ask(question, max_new_tokens=6)
    assert resumed


def test_conversations_that_are_kept_and_not(tmp_path, monkeypatch):
    """Questions, images, retries, steps back, stopped streams, other options, cuts: same answers."""
    model = minigpt4_jax.load(tiny.write_random_model(tmp_path / "model"), dtype="float32")
    resumed, resume = [], model._engine._resume
    monkeypatch.setattr(model._engine, "_resume", lambda *a: resumed.append(1) or resume(*a))
    pictures = np.random.default_rng(0).integers(0, 256, (2, 30, 40, 3), dtype=np.uint8)
    kept, anew = model.conversation(), model.conversation()

    def both(do):
        anew._kept.clear()
        assert do(kept) == do(anew)
        assert [t.answer for t in kept.turns] == [t.answer for t in anew.turns]

    def stopped(talk):
        pieces = talk.stream("tell me a story", max_new_tokens=12)
        first = next(pieces)
        pieces.close()
        return first

    few = {"max_new_tokens": 6}
    both(lambda talk: talk.ask("what is it", pictures[0], **few))
    both(lambda talk: talk.ask("and this", pictures[1], **few))
    both(stopped)
    both(lambda talk: talk.ask("why", temperature=1.0, seed=4, stop=["e"], **few))
    both(lambda talk: talk.retry())
    both(lambda talk: talk.undo())
    both(lambda talk: talk.ask("how", num_beams=2, **few))
    both(lambda talk: talk.ask("how", extra_bos=False, **few))
    assert len(resumed) >= 5
    count = len(resumed)
    for talk in (kept, anew):
        with pytest.warns(UserWarning, match="dropped the oldest"):
            talk.ask("and now", context=60, **few)
    assert [t.answer for t in kept.turns] == [t.answer for t in anew.turns]
    assert len(resumed) == count
    both(lambda talk: talk.ask("again", **few))
    both(lambda talk: talk.reset())
    both(lambda talk: talk.ask("what is it", pictures[0], **few))
