"""Sampling, compared with the original's logits processors and with the definitions of the filters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.paths import FIXTURES

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.sampling import (
    SamplingParams,
    SamplingStages,
    apply_count_penalties,
    apply_repetition_penalty,
    draw,
    filter_logits,
    forbid,
    required_stages,
    sample,
    stack_sampling_params,
)
from minigpt4_jax.utils.platform import compiling_for

# transformers 4.30's processors on float32 logits: 27 settings of top-p, temperature, penalty
DUMP = np.load(FIXTURES / "logits_processors.npz")
EOS = 2

# Compiled as in the engine: operation by operation, each would be a program.
filter_program = jax.jit(filter_logits, static_argnums=2)
sample_program = jax.jit(sample, static_argnums=6)
# Two functions: one would be traced for the first platform only.
platform_programs = {name: jax.jit(partial(sample), static_argnums=6) for name in ("cpu", "gpu")}


@partial(jax.jit, static_argnums=2)
def draw_program(logits, params, num_candidates, keys, step):
    return draw(*filter_logits(logits, params, num_candidates), keys, step)


@jax.jit
def original_program(logits, ids, params):
    logits = apply_repetition_penalty(logits, ids, params.repetition_penalty)
    logits = forbid(logits, jnp.full((3, 1), EOS), jnp.ones(3, bool))  # min_length was on
    return filter_logits(logits, params)


def filtered(logits, params, num_candidates=0):
    """Scores [B, V] in vocabulary order, -inf where a filter removed the token."""
    return in_vocabulary_order(logits.shape, *filter_program(logits, params, num_candidates))


def in_vocabulary_order(shape, scores, ids):
    out = np.full(shape, -np.inf, np.float32)
    np.put_along_axis(out, np.asarray(ids), np.asarray(scores), axis=1)
    return out


def rows(n, **values):
    return stack_sampling_params([SamplingParams(**values)] * n)


@partial(jax.jit, static_argnums=0)
def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize("name", [k for k in DUMP if k not in ("logits", "ids")])
def test_equals_the_original(name):
    top_p, temperature, penalty = (float(part[1:]) for part in name.split("_"))
    params = rows(3, top_p=top_p, temperature=temperature, repetition_penalty=penalty)
    logits, theirs = DUMP["logits"], DUMP[name]
    found = original_program(logits, DUMP["ids"].astype(np.int32), params)
    ours = in_vocabulary_order(logits.shape, *found)
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_penalty_does_not_change_other_tokens():
    logits = np.asarray([[2.0, -2.0, 1.0, 3.0]], np.float32)
    penalize = jax.jit(apply_repetition_penalty)
    out = penalize(logits, np.asarray([[0, 1, 0, -1]]), np.asarray([2.0], np.float32))
    np.testing.assert_allclose(out, [[1.0, -4.0, 1.0, 3.0]])


def test_penalties_of_openai():
    """Subtracted once a time, and once if at all, from generated tokens."""
    generated = np.asarray([[1, 2, 1, -1]] * 3)
    frequency, presence = np.asarray([[0.5, 0.0, 0.5], [0.0, 1.0, 1.0]], np.float32)
    penalize = jax.jit(apply_count_penalties)
    out = penalize(np.zeros((3, 4), np.float32), generated, frequency, presence)
    np.testing.assert_allclose(out, [[0, -1, -0.5, 0], [0, -1, -1, 0], [0, -2, -1.5, 0]])
    params = stack_sampling_params([SamplingParams(frequency_penalty=2.0), SamplingParams()])
    stages = required_stages([SamplingParams(frequency_penalty=2.0)], 4)
    logits = np.asarray([[1.0, 3.0, 2.5, 0.0]] * 2, np.float32)
    none = np.full((2, 1), -1)
    tokens = sample_program(logits, generated[:2], np.full(2, 3), none, keys(2), params, stages)
    assert tokens.tolist() == [0, 1]


def test_prior_token_is_penalized():
    logits = np.asarray([[1.0, 3.0, 2.0, 0.0]] * 2, np.float32)
    params = stack_sampling_params(
        [SamplingParams(repetition_penalty=2.0, prior_token=b) for b in (-1, 1)]
    )
    stages = required_stages([SamplingParams(repetition_penalty=2.0)], 4)
    none = np.full((2, 4), -1)
    tokens = sample_program(logits, none, np.zeros(2, int), none[:, :1], keys(2), params, stages)
    assert tokens.tolist() == [1, 2]


def test_top_k_does_not_depend_on_the_number_of_candidates():
    logits = np.random.default_rng(0).normal(size=(4, 40)).astype(np.float32)
    params = rows(4, temperature=1.0, top_k=5)
    scores = filtered(logits, params)
    assert (np.isfinite(scores).sum(1) == 5).all()
    np.testing.assert_array_equal(filtered(logits, params, num_candidates=8), scores)
    assert (np.argsort(-logits)[:, :5] == np.argsort(-scores)[:, :5]).all()


def test_a_tiny_top_p_keeps_the_most_likely_token():
    logits = np.random.default_rng(0).normal(size=(2, 9)).astype(np.float32)
    allowed = np.isfinite(filtered(logits, rows(2, temperature=1.0, top_p=1e-6)))
    np.testing.assert_array_equal(allowed.argmax(1), logits.argmax(1))
    assert allowed.sum() == 2


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_min_p_is_relative_to_the_most_likely_token(top_p):
    """Applied after the other filters (transformers' MinPLogitsWarper)."""
    logits = np.random.default_rng(1).normal(0, 2, size=(3, 30)).astype(np.float32)
    scores = filtered(logits, rows(3, temperature=0.8, top_p=top_p))
    probs = np.exp(scores - scores.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    expected = np.where(probs < 0.2 * probs.max(1, keepdims=True), -np.inf, scores)
    ours = filtered(logits, rows(3, temperature=0.8, top_p=top_p, min_p=0.2))
    np.testing.assert_array_equal(ours, expected)
    assert 3 < np.isfinite(ours).sum() < np.isfinite(scores).sum()
    alone = np.isfinite(filtered(logits, rows(3, temperature=1.0, min_p=1.0)))
    np.testing.assert_array_equal(alone.argmax(1), logits.argmax(1))
    assert alone.sum() == 3


def test_draws_follow_the_filtered_softmax():
    """Chi-square test over 8,000 draws at p = 0.0001; fails for a wrong filter or a biased draw."""
    logits = np.random.default_rng(3).normal(0, 2, size=(1, 30)).astype(np.float32)
    n = 8000
    many = np.repeat(logits, n, 0)
    params = rows(n, temperature=0.7, top_k=12, top_p=0.95, min_p=0.02)
    drawn = np.asarray(draw_program(many, params, 16, keys(n), np.zeros(n, np.int32)))
    scores = filtered(logits, rows(1, temperature=0.7, top_k=12, top_p=0.95, min_p=0.02))[0]
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    counts = np.bincount(drawn, minlength=30)
    assert counts[probs == 0].sum() == 0
    expected = n * probs[probs > 0]
    chi2 = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    df = len(expected) - 1
    limit = df * (1 - 2 / (9 * df) + 3.72 * np.sqrt(2 / (9 * df))) ** 3  # Wilson-Hilferty
    assert chi2 < limit


def test_draws_of_a_row_do_not_depend_on_other_rows():
    logits = np.random.default_rng(0).normal(size=(6, 50)).astype(np.float32)
    params = rows(6, temperature=1.3, top_k=7, top_p=0.9)
    step, row_keys = np.arange(6, dtype=np.int32), keys(6)
    together = np.asarray(draw_program(logits, params, 0, row_keys, step))
    for i in range(6):
        one, row = rows(1, temperature=1.3, top_k=7, top_p=0.9), slice(i, i + 1)
        alone = draw_program(logits[row], one, 8, row_keys[row], step[row])
        assert alone.tolist() == [together[i]]


def test_stop_tokens_are_forbidden_before_the_minimum_length():
    logits = np.asarray([[0, 0, 0, 9, 0]] * 2, np.float32)
    out = jax.jit(forbid)(logits, np.asarray([[3, -1], [3, -1]]), np.asarray([True, False]))
    assert np.asarray(out).argmax(1).tolist() == [0, 3]


def test_greedy_and_sampled_rows_in_one_batch():
    logits = np.random.default_rng(0).normal(size=(2, 20)).astype(np.float32)
    mixed = [SamplingParams(), SamplingParams(temperature=5.0, top_k=3)]
    none = np.full((2, 4), -1)
    stages = required_stages(mixed, 20)
    assert stages == SamplingStages(random=True, num_candidates=0, penalties=True)
    start, params = np.zeros(2, np.int32), stack_sampling_params(mixed)
    tokens = {
        tuple(sample_program(logits, none, start, none, keys(2, seed), params, stages).tolist())
        for seed in range(20)
    }
    assert {first for first, _ in tokens} == {int(logits[0].argmax())}
    assert len({second for _, second in tokens}) == 3


OPTIONS = [
    {}, {"repetition_penalty": 3.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0},
    {"min_new_tokens": 9}, {"temperature": 3.0}, {"temperature": 3.0, "top_k": 4},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("live", [True, False])
def test_what_is_skipped_changes_no_token(options, live):
    """A row with options beside a greedy one, in a program with branches and in one without."""
    rng = np.random.default_rng(1)
    params = stack_sampling_params([SamplingParams(), SamplingParams(**options)])
    logits = rng.normal(size=(2, 20)).astype(np.float32)
    likely = logits.argmax(1, keepdims=True)
    generated = np.concatenate([likely, likely, np.full((2, 2), -1)], axis=1)
    stages = SamplingStages(random=True, num_candidates=0, penalties=True)
    tokens = {}
    for platform, program in platform_programs.items():  # on a GPU there are no branches
        with compiling_for(platform):
            tokens[platform] = program(
                logits, generated, np.full(2, 2), likely, keys(2, 5), params, stages,
                np.asarray([True, live]),
            ).tolist()  # fmt: skip
    assert tokens["cpu"][0] == tokens["gpu"][0] == int(likely[0, 0])
    assert not live or tokens["cpu"] == tokens["gpu"]
    assert not options or tokens["gpu"][1] != int(likely[1, 0])
    # the option of a row that is done does not count
    assert live or tokens["cpu"][1] == int(likely[1, 0])


def test_few_combinations_of_stages_are_compiled():
    assert required_stages([SamplingParams()], 100) == SamplingStages(False, 0, False)
    penalties = {"repetition_penalty": 1.1, "min_new_tokens": 2, "frequency_penalty": 0.5}
    for name, value in penalties.items():
        row = SamplingParams(**{name: value})
        assert required_stages([row], 100) == SamplingStages(False, 0, True)
        drawn = row._replace(temperature=0.7, top_p=0.9)
        assert required_stages([drawn], 100) == SamplingStages(True, 0, True)
    for top_k in (1, 5, 50):
        row = SamplingParams(temperature=1.0, top_k=top_k)
        assert required_stages([row], 100) == SamplingStages(True, 64, True)
    assert required_stages([SamplingParams(temperature=1.0, top_k=90)], 1000).num_candidates == 128


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_k": -1}, {"repetition_penalty": 0.0}, {"min_new_tokens": -1}, {"min_p": -0.1},
    ],
)  # fmt: skip
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong).check()
