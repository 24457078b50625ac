"""Beam search, compared with the rules of transformers 4.30 written for one hypothesis at a time."""

from functools import cache

import jax
import numpy as np
import pytest
from flax import nnx

from minigpt4_jax.config import LlmConfig, ModelConfig, QFormerConfig, VisionConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.inference.sampling import SamplingParams
from minigpt4_jax.models.llm import unstack
from minigpt4_jax.models.minigpt import MiniGpt

VOCAB, LENGTH = 40, 32


@cache
def model():
    """With a sliding window, so that the mask over a beam's old tokens is tested too."""
    vision = VisionConfig(image_size=28, patch_size=14, width=8, depth=1, heads=2, mlp=8)
    qformer = QFormerConfig(queries=2, hidden=8, layers=1, heads=2, ffn=8, vision_width=8)
    llm = LlmConfig(
        vocab=VOCAB, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn=24, window=7
    )
    module = MiniGpt(ModelConfig(vision=vision, qformer=qformer, llm=llm), nnx.Rngs(0))
    for _, leaf in nnx.to_flat_state(nnx.state(module.llm)):  # so that logits differ clearly
        leaf.set_value(leaf.get_value() * (4 if leaf.get_value().ndim > 1 else 1))
    module.llm = unstack(module.llm)
    return module


@cache
def engine():
    return Engine(model())


@cache
def forward():
    llm = model().llm
    return jax.jit(lambda tokens, n: llm.logits(llm(llm.embed_tokens(tokens), n)))


def log_probs(rows):
    """Log-probabilities of the token after each row of ids (up to 8): [rows, V]."""
    tokens = np.zeros((8, LENGTH), np.int32)
    lengths = np.ones(8, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    logits = np.asarray(forward()(tokens, lengths))[np.arange(8), lengths - 1][: len(rows)]
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def expected(prompt, max_new_tokens, stops, beams, params):
    """[(ids, score)], best first."""
    q, power = beams.num_beams, beams.length_penalty
    running, finished, complete = [([], 0.0)] + [([], -1e9)] * (q - 1), [], False
    for length in range(max_new_tokens):
        scores = log_probs([prompt + ids for ids, _ in running]).copy()
        for row, (ids, _) in zip(scores, running, strict=True):
            used = list({*ids, *([params.prior_token] if params.prior_token >= 0 else [])})
            row[used] *= params.repetition_penalty
            for stop in stops:
                if length < params.min_new_tokens and ids[len(ids) - len(stop) + 1 :] == stop[:-1]:
                    row[stop[-1]] = -np.inf
        total = scores + np.array([[s] for _, s in running])
        continued = []
        for rank, index in enumerate(np.argsort(-total, axis=None, kind="stable")):
            ids, score = [*running[index // VOCAB][0], int(index % VOCAB)], total.flat[index]
            if any(ids[-len(s) :] == s for s in stops):
                if rank < q:
                    finished.append((ids, score / (length + 1) ** power))
                    finished = sorted(finished, key=lambda f: -f[1])[:q]
            else:
                continued.append((ids, score))
            if len(continued) == q:
                break
        running = continued
        best = total.max() / (length + 2) ** power
        if len(finished) == q and (beams.early_stopping or finished[-1][1] >= best):
            complete = True
            break
    if not complete:
        finished += [(ids, score / (1 + max_new_tokens) ** power) for ids, score in running]
    return sorted(finished, key=lambda f: -f[1])[:q]


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(1, VOCAB, n).tolist() for n in (5, 12, 2)]


OPTIONS = [
    (BeamSearchConfig(3, num_return_sequences=3), SamplingParams()),
    (
        BeamSearchConfig(3, 2.0, num_return_sequences=2),
        SamplingParams(repetition_penalty=1.5, min_new_tokens=3, prior_token=7),
    ),
    (BeamSearchConfig(3, -1.0, True, num_return_sequences=3), SamplingParams()),
    (BeamSearchConfig(3, 0.0, True), SamplingParams(min_new_tokens=2, repetition_penalty=0.9)),
]


@pytest.mark.parametrize("without_penalties", [False, True])
def test_equals_the_reference(without_penalties):
    """Requests with different options, lengths, limits and stops in one batch."""
    unstopped = engine().search(
        [Request(p, beam_search=BeamSearchConfig(3), max_new_tokens=8) for p in prompts()]
    )
    ends = [answer.ids for (answer,) in unstopped]
    stops = [[[ends[0][3]], ends[1][2:4]], [ends[1][2:4], [7]], [[ends[2][2]], [3], [11]]]
    options = OPTIONS[::2] if without_penalties else OPTIONS  # another program
    requests = [
        Request(
            prompts()[i % 3], None, (8, 6, 7)[i % 3], p, stop_sequences=stops[i % 3], beam_search=b
        )
        for i, (b, p) in enumerate(options * 2)
    ]
    num_stopped = 0
    for r, answers in zip(requests, engine().search(requests), strict=True):
        reference = expected(
            list(r.tokens), r.max_new_tokens, list(r.stop_sequences), r.beam_search, r.sampling
        )
        assert len(answers) == r.beam_search.num_return_sequences
        for answer, (ids, score) in zip(answers, reference, strict=False):
            assert answer.ids == ids
            assert answer.score == pytest.approx(score, rel=1e-4)
            logprobs = [log_probs([r.tokens + ids[:n]])[0, ids[n]] for n in range(len(ids))]
            np.testing.assert_allclose(answer.logprobs, logprobs, rtol=1e-3, atol=1e-4)
            assert answer.hit_stop == any(ids[-len(s) :] == s for s in r.stop_sequences)
            num_stopped += answer.hit_stop
    assert num_stopped >= 3


def test_logits_that_are_not_finite_end_only_their_search():
    """One prompt has a token whose embedding is NaN, another reaches one later; the third is whole."""
    beams = BeamSearchConfig(3, num_return_sequences=2)
    requests = [Request(p, beam_search=beams, max_new_tokens=8) for p in prompts()]
    expected = engine().search(requests)
    token = prompts()[0][0]
    module = nnx.clone(model())  # a merge of its split shares the variables with the cached model
    embedding = module.llm.embed
    embedding.set_value(embedding.get_value().at[token].set(np.nan))
    poisoned = Engine(module)
    result = poisoned.search(requests)
    assert [[c.nonfinite for c in best] for best in result[:1]] == [[True, True]]
    assert result[0][0].ids == []
    others = [i for i, p in enumerate(prompts()) if token not in p and not result[i][0].nonfinite]
    for i in others:
        assert [c.ids for c in result[i]] == [c.ids for c in expected[i]]
    alone = [poisoned.search([r])[0] for r in requests[1:]]
    assert [[c.ids for c in best] for best in alone] == [
        [c.ids for c in best] for best in result[1:]
    ]


def test_requests_with_and_without_beams_in_one_call():
    mixed = [
        Request(p, max_new_tokens=8, beam_search=BeamSearchConfig(n))
        for p, n in zip(prompts(), (3, 1, 3), strict=True)
    ]
    completions = engine().answer(mixed)
    alone = engine().search(mixed[:1])[0]
    assert [a.ids for a in completions[0]] == [a.ids for a in alone]
    np.testing.assert_allclose(completions[0][0].score, alone[0].score, rtol=1e-5)
    assert len(completions[1]) == 1 and len(completions[1][0].ids) == 8


@pytest.mark.parametrize(
    ("beams", "params", "message"),
    [
        (BeamSearchConfig(0), SamplingParams(), "num_beams 0"),
        (
            BeamSearchConfig(2, num_return_sequences=3),
            SamplingParams(),
            "num_return_sequences 3.*num_beams",
        ),
        (BeamSearchConfig(2, float("nan")), SamplingParams(), "length_penalty"),
        (BeamSearchConfig(2, early_stopping="never"), SamplingParams(), "early_stopping"),
        (BeamSearchConfig(2), SamplingParams(temperature=0.5), "num_beams 2 with temperature 0.5"),
        (BeamSearchConfig(2), SamplingParams(top_k=3), "top_k"),
        (BeamSearchConfig(2), SamplingParams(top_p=0.5), "top_p"),
        (BeamSearchConfig(2), SamplingParams(min_p=0.5), "min_p"),
    ],
)
def test_options_that_contradict_are_named(beams, params, message):
    with pytest.raises(UserError, match=message):
        beams.check(params)
