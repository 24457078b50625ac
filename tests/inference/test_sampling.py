"""Sampling, compared with the original's logits processors and with the definitions of the filters."""

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


def filtered(logits, params, num_candidates=0):
    """Scores [B, V] in vocabulary order, -inf where a filter removed the token."""
    scores, ids = filter_logits(jnp.asarray(logits), params, num_candidates)
    out = np.full(logits.shape, -np.inf, np.float32)
    np.put_along_axis(out, np.asarray(ids), np.asarray(scores), axis=1)
    return out


def rows(n, **values):
    return stack_sampling_params([SamplingParams(**values)] * n)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.mark.parametrize("name", [k for k in DUMP if k not in ("logits", "ids")])
def test_equals_the_original(name):
    top_p, temperature, penalty = (float(part[1:]) for part in name.split("_"))
    params = rows(3, top_p=top_p, temperature=temperature, repetition_penalty=penalty)
    ids = jnp.asarray(DUMP["ids"], jnp.int32)
    logits = apply_repetition_penalty(jnp.asarray(DUMP["logits"]), ids, params.repetition_penalty)
    logits = forbid(logits, jnp.full((3, 1), EOS), jnp.ones(3, bool))  # min_length was on
    ours, theirs = filtered(np.asarray(logits), params), DUMP[name]
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_penalty_does_not_change_other_tokens():
    logits = jnp.asarray([[2.0, -2.0, 1.0, 3.0]])
    out = apply_repetition_penalty(logits, jnp.asarray([[0, 1, 0, -1]]), jnp.asarray([2.0]))
    np.testing.assert_allclose(out, [[1.0, -4.0, 1.0, 3.0]])


def test_penalties_of_openai():
    """Subtracted once a time, and once if at all, from generated tokens."""
    logits = jnp.zeros((3, 4))
    generated = jnp.asarray([[1, 2, 1, -1]] * 3)
    out = apply_count_penalties(
        logits, generated, jnp.asarray([0.5, 0.0, 0.5]), jnp.asarray([0.0, 1.0, 1.0])
    )
    np.testing.assert_allclose(out, [[0, -1, -0.5, 0], [0, -1, -1, 0], [0, -2, -1.5, 0]])
    params = stack_sampling_params([SamplingParams(frequency_penalty=2.0), SamplingParams()])
    stages = required_stages([SamplingParams(frequency_penalty=2.0)], 4)
    logits = jnp.asarray([[1.0, 3.0, 2.5, 0.0]] * 2)
    none = jnp.full((2, 1), -1)
    tokens = sample(logits, generated[:2], jnp.full(2, 3), none, keys(2), params, stages)
    assert tokens.tolist() == [0, 1]


def test_prior_token_is_penalized():
    logits = jnp.asarray([[1.0, 3.0, 2.0, 0.0]] * 2)
    params = stack_sampling_params(
        [SamplingParams(repetition_penalty=2.0, prior_token=b) for b in (-1, 1)]
    )
    stages = required_stages([SamplingParams(repetition_penalty=2.0)], 4)
    none = jnp.full((2, 3), -1)
    tokens = sample(logits, none, jnp.zeros(2, int), none[:, :1], keys(2), params, stages)
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
    many = jnp.repeat(jnp.asarray(logits), n, 0)
    params = rows(n, temperature=0.7, top_k=12, top_p=0.95, min_p=0.02)
    drawn = np.asarray(draw(*filter_logits(many, params, 16), keys(n), jnp.zeros(n, jnp.int32)))
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
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(6, 50)), jnp.float32)
    params = rows(6, temperature=1.3, top_k=7, top_p=0.9)
    step = jnp.arange(6, dtype=jnp.int32)
    together = draw(*filter_logits(logits, params, 0), keys(6), step)
    for i in range(6):
        one = rows(1, temperature=1.3, top_k=7, top_p=0.9)
        alone = draw(*filter_logits(logits[i : i + 1], one, 8), keys(6)[i : i + 1], step[i : i + 1])
        assert alone[0] == together[i]


def test_stop_tokens_are_forbidden_before_the_minimum_length():
    logits = jnp.zeros((2, 5)).at[:, 3].set(9.0)
    out = forbid(logits, jnp.asarray([[3, -1], [3, -1]]), jnp.asarray([True, False]))
    assert out.argmax(1).tolist() == [0, 3]


def test_greedy_and_sampled_rows_in_one_batch():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 20)), jnp.float32)
    mixed = [SamplingParams(), SamplingParams(temperature=5.0, top_k=3)]
    none = jnp.full((2, 4), -1)
    stages = required_stages(mixed, 20)
    assert stages == SamplingStages(random=True, num_candidates=0, penalties=True)
    start, params = jnp.zeros(2, jnp.int32), stack_sampling_params(mixed)
    tokens = {
        tuple(sample(logits, none, start, none, keys(2, seed), params, stages).tolist())
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
    logits = jnp.asarray(rng.normal(size=(2, 20)), jnp.float32)
    likely = logits.argmax(1, keepdims=True)
    generated = jnp.concatenate([likely, likely, jnp.full((2, 2), -1)], axis=1)
    stages = SamplingStages(random=True, num_candidates=0, penalties=True)
    tokens = {}
    for platform in ("cpu", "gpu"):  # on a GPU there are no branches
        with compiling_for(platform):
            tokens[platform] = sample(
                logits, generated, jnp.full(2, 2), likely, keys(2, 5), params, stages,
                jnp.asarray([True, live]),
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
