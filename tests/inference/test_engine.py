"""The engine: stopping, limits, batches, buckets; cached decoding compared with full forward passes."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.small_engine import VOCAB, P, engine, greedy_requests, model, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.checkpoint.parameters import abstract_model
from minigpt4_jax.config import LlmConfig, ModelConfig, VisionConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.requests import Request, bucket, fine_bucket
from minigpt4_jax.inference.sampling import SamplingParams, required_stages
from minigpt4_jax.inference.visual_tokens import stack_visual
from minigpt4_jax.utils import platform


@cache
def programs(window):
    """Compiled (merge, prefill, decoding steps, full forward pass) of a model."""
    module = model(window)
    return (
        jax.jit(module.merge),
        jax.jit(lambda x, lengths: module.llm.prefill(x, lengths, 128)),
        jax.jit(module.llm.decode),
        jax.jit(module.llm),
    )


@pytest.mark.smoke
def test_cached_decoding_equals_a_full_forward_pass():
    """At every step, for any lengths, images and batch, with and without a sliding window."""

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=4),
        st.sampled_from([None, 5]),
        st.integers(0, 1000),
    )
    def check(shape, window, seed):
        rng = np.random.default_rng(seed)
        module, (merge, prefill, decode, forward) = model(window), programs(window)
        prompts = [prompt(rng, n, i) for n, i in shape] + [([1], None)] * (4 - len(shape))
        lengths = np.array([len(tokens) for tokens, _ in prompts], np.int32)
        tokens = np.zeros((4, 64), np.int32)
        continued = rng.integers(1, VOCAB, (4, 64)).astype(
            np.int32
        )  # the prompts, then random tokens
        for i, (row, _) in enumerate(prompts):
            tokens[i, : len(row)] = continued[i, : len(row)] = row
        visual = stack_visual([v for _, v in prompts] + [np.zeros((2 * P, 16))], P, 16)[:4]
        embeds = np.asarray(merge(continued, visual))
        expected = np.asarray(forward(embeds, lengths + 8))
        # Weights this large amplify rounding errors in places. Differences as large as those from
        # changing the last bits of the embeddings are tolerated.
        rounding = np.zeros((4, 64, 1), np.float32)
        for _ in range(4):
            last_bits = (1 + rng.choice([-1, 1], embeds.shape) * 2.0**-23).astype(np.float32)
            changed = np.abs(np.asarray(forward(embeds * last_bits, lengths + 8)) - expected)
            rounding = np.maximum(rounding, changed.max(-1, keepdims=True))
        hidden, cache = prefill(merge(tokens, visual), lengths)
        rows, embedding = np.arange(4), np.asarray(module.llm.embed.get_value())
        for step in range(8):
            last = np.asarray(hidden)[rows, lengths - 1 if step == 0 else 0]
            index = lengths + step - 1
            tolerance = 2e-4 * (1 + np.abs(expected[rows, index])) + 2 * rounding[rows, index]
            assert np.all(np.abs(last - expected[rows, index]) <= tolerance)
            positions = (lengths + step)[:, None]
            embeds = embedding[np.take_along_axis(continued, positions, axis=1)]
            hidden, cache = decode(embeds, positions, cache)

    check()


def test_decoding_several_positions_at_once_equals_one_by_one():
    rng = np.random.default_rng(0)
    _, prefill, decode, _ = programs(None)
    embeds = rng.normal(size=(4, 64, 16)).astype(np.float32)
    lengths = np.asarray([7, 4, 20, 1], np.int32)
    _, cache = prefill(embeds, lengths)
    more = rng.normal(size=(4, 3, 16)).astype(np.float32)
    positions = lengths[:, None] + np.arange(3)
    together = np.asarray(decode(more, positions, cache)[0])
    for t in range(3):
        one, cache = decode(more[:, t : t + 1], positions[:, t : t + 1], cache)
        np.testing.assert_allclose(np.asarray(one)[:, 0], together[:, t], rtol=1e-4, atol=1e-5)


def test_batch_size_and_layout_do_not_change_the_ids():
    together = engine().generate(greedy_requests())
    assert [len(ids) for ids in together] == [8] * 4
    assert [engine().generate([r])[0] for r in greedy_requests()] == together
    assert engine().generate(greedy_requests(), batch_size=3) == together
    assert engine(stacked=True).generate(greedy_requests()) == together


def test_sampled_ids_depend_on_the_seed_and_not_on_the_batch():
    params = SamplingParams(temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.2)
    sampled = greedy_requests(sampling=params, seed=5)
    together = engine().generate(sampled)
    assert [engine().generate([r])[0] for r in sampled] == together
    reversed_ = engine().generate(sampled[::-1])
    assert reversed_[::-1] == together
    mixed = [*sampled[:2], *greedy_requests()[2:]]
    assert engine().generate(mixed)[:2] == together[:2]
    other = engine().generate(greedy_requests(sampling=params, seed=6))
    assert other != together
    assert together != engine().generate(greedy_requests())


def test_a_stop_sequence_ends_only_its_row():
    unstopped = engine().generate(greedy_requests())
    stops = [[unstopped[0][2]], unstopped[1][3:5]]  # one id; two ids, in another row
    for i, ids in enumerate(engine().generate(greedy_requests(stop_sequences=stops))):
        assert ids == _until(unstopped[i], stops)
    # in the wrong order it does not stop
    wrong = [[unstopped[1][4], unstopped[1][3]]] if unstopped[1][3] != unstopped[1][4] else [[0, 0]]
    assert engine().generate(greedy_requests(stop_sequences=wrong))[1] == _until(
        unstopped[1], wrong
    )


def _until(ids, stops):
    for end in range(1, len(ids) + 1):
        if any(ids[max(0, end - len(s)) : end] == list(s) for s in stops):
            return ids[:end]
    return ids


def test_limits_and_stop_sequences_of_each_row():
    unstopped = engine().generate(greedy_requests())
    requests = [
        Request(r.tokens, r.visual, limit, stop_sequences=stops)
        for r, limit, stops in zip(
            greedy_requests(), (1, 8, 3, 8), ([], [], [], [[unstopped[3][1]]]), strict=True
        )
    ]
    ids = engine().generate(requests)
    assert ids[:3] == [unstopped[0][:1], unstopped[1], unstopped[2][:3]]
    assert ids[3] == _until(unstopped[3], [[unstopped[3][1]]])


def test_the_first_token_can_stop():
    unstopped = engine().generate(greedy_requests())
    assert (
        engine().generate(greedy_requests(stop_sequences=[[unstopped[0][0]]]))[0]
        == unstopped[0][:1]
    )


def test_minimum_length_delays_the_stop():
    unstopped = engine().generate(greedy_requests(1))[0]
    params = SamplingParams(min_new_tokens=4)
    ids = engine().generate(greedy_requests(1, stop_sequences=[[unstopped[0]]], sampling=params))[0]
    assert unstopped[0] not in ids[:4]


def test_decoding_in_chunks_gives_the_same_ids():
    an_engine, requests = engine(), greedy_requests()
    stages = required_stages([r.sampling for r in requests], VOCAB)
    state = an_engine.prefill(requests)
    while not np.asarray(state.done).all():
        state = an_engine.decode(state, stages, 3)
    ids = np.asarray(state.ids)[:, :8].tolist()
    assert ids == engine().generate(requests)


def test_another_length_in_the_same_bucket_compiles_nothing(compiled):
    an_engine = Engine(model())
    an_engine.generate(greedy_requests(2))
    count = len(compiled)
    assert count >= 2  # prefill and the decoding loop, at least
    rng = np.random.default_rng(1)
    again = [Request(*prompt(rng, 9, 0), 7), Request(*prompt(rng, 35, 1), 3)]
    an_engine.generate(again)
    assert len(compiled) == count
    an_engine.generate([Request(*prompt(rng, 300, 1), 3)])  # another bucket
    assert len(compiled) > count


def test_other_parameters_use_the_same_programs(compiled):
    an_engine = Engine(model())
    before = an_engine.generate(greedy_requests(1))
    other = jax.tree.map(lambda a: a + 0.1, nnx.state(model()))
    count = len(compiled)
    an_engine.set_parameters(nnx.merge(nnx.graphdef(model()), other))
    assert an_engine.generate(greedy_requests(1)) != before
    assert len(compiled) == count


def test_slots_of_finished_rows_are_refilled():
    """More requests than slots, with different limits: the ids are those of single requests."""
    requests = [r for n in (1, 6, 3) for r in greedy_requests(max_new_tokens=n)]
    unstopped = engine().generate(greedy_requests())
    ids = engine().generate(requests, batch_size=3)
    assert ids == [row[:n] for n in (1, 6, 3) for row in unstopped]


def test_progress_grows_to_the_final_ids():
    final = engine().generate(greedy_requests())
    ids = {i: [] for i in range(4)}
    for progress in engine().run(greedy_requests(), chunk=3, progress=True):
        i, completion = progress.key, progress.completion
        assert list(progress.request.tokens) == greedy_requests()[i].tokens
        assert completion.ids[: len(ids[i])] == ids[i]
        ids[i] = completion.ids
        assert progress.finished == (len(completion.ids) == 8)
    assert [ids[i] for i in range(4)] == final


def test_a_stop_check_ends_only_its_row():
    unstopped = engine().generate(greedy_requests())
    requests = greedy_requests()
    stop_check = lambda ids: 2 if len(ids) >= 2 else None  # noqa: E731
    requests[1] = Request(requests[1].tokens, requests[1].visual, 8, stop_check=stop_check)
    completions = [completion for (completion,) in engine().answer(requests)]
    assert [c.ids for c in completions] == [unstopped[0], unstopped[1][:2], *unstopped[2:]]
    assert [c.hit_stop for c in completions] == [False, True, False, False]


def poisoned(token, value=np.nan):
    """An engine of the model in which a row gets bad logits from the step after it reads `token`."""
    module = nnx.clone(model())  # a merge of its split shares the variables with the cached model
    embedding = module.llm.embed
    embedding.set_value(embedding.get_value().at[token].set(value))
    return Engine(module)


def read_by(request, ids):
    """All tokens that are read before the answer is complete."""
    return {*request.tokens, *ids[:-1]}


def only_in_one(requests, answers):
    """(row, step): a token that this row alone reads, generated at this step."""
    for row, ids in enumerate(answers):
        others = [
            read_by(r, a)
            for i, (r, a) in enumerate(zip(requests, answers, strict=True))
            if i != row
        ]
        for step, token in enumerate(ids[:-1]):
            seen_before = {*requests[row].tokens, *ids[:step]}
            if step and token not in seen_before.union(*others):
                return row, step
    raise AssertionError("no such token; change the requests")


@pytest.mark.parametrize(("value", "batch_size"), [(np.nan, 4), (np.inf, 4), (np.nan, 2)])
def test_logits_that_are_not_finite_end_only_their_row(value, batch_size):
    requests = greedy_requests()
    expected = engine().generate(requests)
    row, step = only_in_one(requests, expected)
    completions = [c for (c,) in poisoned(expected[row][step], value).answer(requests, batch_size)]
    assert [c.nonfinite for c in completions] == [i == row for i in range(4)]
    assert completions[row].ids == expected[row][: step + 1] and not completions[row].hit_stop
    assert all(np.isfinite(c.logprobs).all() for c in completions)
    assert [c.ids for i, c in enumerate(completions) if i != row] == [
        ids for i, ids in enumerate(expected) if i != row
    ]


def test_logits_that_are_not_finite_at_the_first_token():
    requests = greedy_requests()
    token = requests[0].tokens[0]
    (first,), *rest = poisoned(token).answer(requests)
    assert (first.ids, first.score, first.nonfinite) == ([], 0, True)
    for request, (completion,) in zip(requests[1:], rest, strict=True):
        assert completion.nonfinite == (token in read_by(request, [*completion.ids, -2]))


def test_limits_and_stops_share_a_program(compiled):
    """Only their numbers differ, up to bucket sizes."""
    request = greedy_requests(1)[0]
    engine().answer([request])
    compiled.clear()
    for changes in (
        {"max_new_tokens": 3},
        {"max_new_tokens": 20},
        {"stop_sequences": [[5]]},
        {"stop_sequences": [[1, 2, 3, 4], [7], [8, 9], [3], [4]]},
        {"seed": 3},
    ):
        engine().answer([replace(request, **changes)])
    assert compiled == []


def test_log_probabilities_are_those_of_a_full_forward_pass():
    module, (_, _, _, forward) = model(), programs(None)
    (answer,) = engine().answer(greedy_requests(1))[0]
    row = [*greedy_requests(1)[0].tokens, *answer.ids]
    tokens = np.zeros((4, 64), np.int32)
    tokens[0, : len(row)] = row
    embedding = np.asarray(module.llm.embed.get_value())
    hidden = forward(embedding[tokens], np.full(4, len(row), np.int32))
    scores = jax.jit(lambda x: jax.nn.log_softmax(module.llm.logits(x)))(np.asarray(hidden)[0])
    at = np.arange(len(row) - len(answer.ids), len(row))
    expected = np.asarray(scores)[at - 1, answer.ids]
    np.testing.assert_allclose(answer.logprobs, expected, rtol=1e-3, atol=1e-4)
    assert answer.score == pytest.approx(sum(answer.logprobs))


def test_buckets():
    assert [bucket(n) for n in (1, 32, 33, 49, 65, 96, 97, 129, 193, 385)] == [
        32, 32, 48, 64, 96, 96, 128, 192, 256, 512,
    ]  # fmt: skip
    assert all(n <= bucket(n) <= max(32, 2 * n) for n in range(1, 3000))


@pytest.mark.parametrize("weights", [100.0, 880.0, 25_000.0])
def test_few_slots_of_a_fine_bucket_are_unused(weights):
    """At most 4 % of what a step reads, or 15 slots; with large weights the buckets are the coarse ones."""
    lengths = [fine_bucket(n, weights) for n in range(1, 3000)]
    assert lengths == sorted(lengths)
    for n, length in enumerate(lengths, 1):
        assert n <= length <= bucket(n)
        assert length - n <= max(15, 0.04 * (weights + n))
    if weights > 20_000:
        assert all(fine_bucket(n, weights) == bucket(n) for n in range(1, 1024))


def test_cache_lengths_are_finer_on_a_gpu():
    an_engine = engine()
    assert an_engine.cache_length(1025, 32) == 1536
    with platform.compiling_for("gpu"):
        assert an_engine.cache_length(1025, 32) == 1056
        sizes = an_engine.bucket_sizes([Request([1] * 1000, max_new_tokens=25)], 32)
    assert sizes.cache_length == 1056


def test_no_requests():
    assert engine().generate([]) == []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("count", "kind"), [(1, None), (4, None), (4, "int8"), (4, "float8")])
def test_decoding_copies_neither_weights_nor_cache(dtype, count, kind):
    """The temporary memory of the compiled loop is small. XLA tends to keep converted or transposed
    copies of loop invariants (27 GB for a 7B in bfloat16)."""
    llm = LlmConfig(vocab=4096, width=128, layers=2, heads=4, kv_heads=4, head_dim=32, ffn=512)
    vision = VisionConfig(image_size=28, patch_size=14, width=8, depth=1, heads=2, mlp=8)
    config = ModelConfig(vision=vision, qformer=None, llm=llm)
    graphdef, state = nnx.split(abstract_model(config, stacked=False))
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, dtype if a.ndim > 1 else jnp.float32), state
    )
    module = nnx.merge(graphdef, state)
    module.llm.cache_kind = kind
    an_engine = Engine(module)
    inputs = an_engine.batch_inputs([Request([1, 2], max_new_tokens=500)] * count)
    stages = required_stages([SamplingParams()], llm.vocab)
    state = jax.eval_shape(
        lambda leaves, inputs: an_engine._prefill(leaves, inputs, 512, 512, stages),
        an_engine._leaves, inputs,
    )  # fmt: skip
    compiled = an_engine._decode.lower(an_engine._leaves, state, 5, 1, stages).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    cache = jax.tree.leaves(state.cache)
    if kind is not None:  # XLA on CPU converts one layer's keys and values to floats at a time
        assert temporary < 1.25 * 4 * sum(a.size for a in cache) / llm.layers
        return
    matrices = [a for a in an_engine._leaves if a.ndim > 1]
    assert temporary < sum(a.size * a.dtype.itemsize for a in matrices) / 4
    assert temporary < sum(a.size * a.dtype.itemsize for a in cache) / 4
