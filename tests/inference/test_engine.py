"""The engine: stop rules, limits, batches, buckets; cached decoding against whole forward passes."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.small_engine import VOCAB, P, engine, greedy, model, prompt
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.checkpoint.parameters import abstract_model
from minigpt4_jax.config import LlmConfig, ModelConfig, VisionConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.requests import Request, bucket, stack_visual
from minigpt4_jax.inference.sampling import SamplingParams, stages_of


@cache
def programs(window):
    """Compiled (prefill, one step, whole forward pass) of a model."""
    module = model(window)
    return (
        jax.jit(lambda x, lengths: module.llm.prefill(x, lengths, 128)),
        jax.jit(module.llm.decode),
        jax.jit(module.llm),
    )


@pytest.mark.smoke
def test_cached_decoding_equals_a_whole_forward_pass():
    """At every step, for any lengths, images and batch, with and without a sliding window."""

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2)), min_size=1, max_size=4),
        st.sampled_from([None, 5]),
        st.integers(0, 1000),
    )
    def check(shape, window, seed):
        rng = np.random.default_rng(seed)
        module, (prefill, decode, whole) = model(window), programs(window)
        prompts = [prompt(rng, n, i) for n, i in shape] + [([1], None)] * (4 - len(shape))
        lengths = np.array([len(tokens) for tokens, _ in prompts], np.int32)
        tokens = np.zeros((4, 64), np.int32)
        longer = rng.integers(1, VOCAB, (4, 64)).astype(np.int32)  # the prompts, then anything
        for i, (row, _) in enumerate(prompts):
            tokens[i, : len(row)] = longer[i, : len(row)] = row
        visual = stack_visual([v for _, v in prompts] + [np.zeros((2 * P, 16))], 16)[:4]
        embeds = module.merge(longer, visual)
        expected = np.asarray(whole(embeds, lengths + 8))
        # Weights this large magnify rounding in places: what a change of the embeddings' last bits
        # does to a hidden state is no difference.
        moved = np.zeros((4, 64, 1), np.float32)
        for _ in range(4):
            last_bits = (1 + rng.choice([-1, 1], embeds.shape) * 2.0**-23).astype(np.float32)
            changed = np.abs(np.asarray(whole(embeds * last_bits, lengths + 8)) - expected)
            moved = np.maximum(moved, changed.max(-1, keepdims=True))
        hidden, cache = prefill(module.merge(tokens, visual), lengths)
        rows = np.arange(4)
        for step in range(8):
            last = hidden[rows, lengths - 1] if step == 0 else hidden[:, 0]
            at = lengths + step - 1
            allowed = 2e-4 * (1 + np.abs(expected[rows, at])) + 2 * moved[rows, at]
            assert np.all(np.abs(last - expected[rows, at]) <= allowed)
            at = (lengths + step)[:, None]
            embeds = module.llm.embed_tokens(np.take_along_axis(longer, at, axis=1))
            hidden, cache = decode(embeds, at, cache)

    check()


def test_several_positions_at_once_equal_one_after_another():
    rng = np.random.default_rng(0)
    module, (prefill, decode, _) = model(), programs(None)
    embeds = jnp.asarray(rng.normal(size=(4, 64, 16)), jnp.float32)
    lengths = jnp.asarray([7, 4, 20, 1])
    _, cache = prefill(embeds, lengths)
    more = jnp.asarray(rng.normal(size=(4, 3, 16)), jnp.float32)
    positions = lengths[:, None] + jnp.arange(3)
    together, _ = module.llm.decode(more, positions, cache)
    for t in range(3):
        one, cache = decode(more[:, t : t + 1], positions[:, t : t + 1], cache)
        np.testing.assert_allclose(one[:, 0], together[:, t], rtol=1e-4, atol=1e-5)


def test_a_row_alone_and_in_a_batch_and_in_either_layout():
    together = engine().generate(greedy())
    assert [len(ids) for ids in together] == [8] * 4
    assert [engine().generate([r])[0] for r in greedy()] == together
    assert engine().generate(greedy(), batch_size=3) == together
    assert engine(stacked=True).generate(greedy()) == together


def test_a_seed_gives_the_same_text_whatever_the_batch():
    options = SamplingParams(temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.2)
    sampled = greedy(options=options, seed=5)
    together = engine().generate(sampled)
    assert [engine().generate([r])[0] for r in sampled] == together
    reversed_ = engine().generate(sampled[::-1])
    assert reversed_[::-1] == together
    mixed = [*sampled[:2], *greedy()[2:]]
    assert engine().generate(mixed)[:2] == together[:2]
    other = engine().generate(greedy(options=options, seed=6))
    assert other != together
    assert together != engine().generate(greedy())


def test_stop_sequences_end_a_row_and_no_other():
    free = engine().generate(greedy())
    stops = [[free[0][2]], free[1][3:5]]  # one id; two ids, in another row
    for i, ids in enumerate(engine().generate(greedy(stops=stops))):
        wanted = _until(free[i], stops)
        assert ids == wanted
    # a sequence has to be complete, and in order
    wrong = [[free[1][4], free[1][3]]] if free[1][3] != free[1][4] else [[0, 0]]
    assert engine().generate(greedy(stops=wrong))[1] == _until(free[1], wrong)


def _until(ids, stops):
    for end in range(1, len(ids) + 1):
        if any(ids[max(0, end - len(s)) : end] == list(s) for s in stops):
            return ids[:end]
    return ids


def test_limits_and_stop_rules_by_row():
    free = engine().generate(greedy())
    requests = [
        Request(r.tokens, r.visual, limit, stops=stops)
        for r, limit, stops in zip(
            greedy(), (1, 8, 3, 8), ([], [], [], [[free[3][1]]]), strict=True
        )
    ]
    found = engine().generate(requests)
    assert found[:3] == [free[0][:1], free[1], free[2][:3]]
    assert found[3] == _until(free[3], [[free[3][1]]])


def test_the_first_token_can_be_the_stop():
    free = engine().generate(greedy())
    assert engine().generate(greedy(stops=[[free[0][0]]]))[0] == free[0][:1]


def test_minimum_length_puts_the_stop_off():
    free = engine().generate(greedy(1))[0]
    options = SamplingParams(min_new_tokens=4)
    found = engine().generate(greedy(1, stops=[[free[0]]], options=options))[0]
    assert free[0] not in found[:4]


def test_decoding_in_parts_gives_the_same():
    runner, requests = engine(), greedy()
    plan = stages_of([r.options for r in requests], VOCAB)
    state = runner.prefill(requests)
    while not np.asarray(state.done).all():
        state = runner.decode(state, plan, 3)
    ids = np.asarray(state.ids)[:, :8].tolist()
    assert ids == engine().generate(requests)


def test_another_length_in_the_same_bucket_compiles_nothing(compiled):
    runner = Engine(model())
    runner.generate(greedy(2))
    count = len(compiled)
    assert count >= 2  # prefill and the decoding loop, at least
    rng = np.random.default_rng(1)
    again = [Request(*prompt(rng, 9, 0), 7), Request(*prompt(rng, 35, 1), 3)]
    runner.generate(again)
    assert len(compiled) == count
    runner.generate([Request(*prompt(rng, 300, 1), 3)])  # another bucket
    assert len(compiled) > count


def test_other_parameters_in_the_same_programs(compiled):
    runner = Engine(model())
    before = runner.generate(greedy(1))
    other = jax.tree.map(lambda a: a + 0.1, nnx.state(model()))
    count = len(compiled)
    runner.set_parameters(nnx.merge(nnx.graphdef(model()), other))
    assert runner.generate(greedy(1)) != before
    assert len(compiled) == count


def test_slots_of_finished_rows_are_filled_again():
    """More requests than slots, of mixed limits: each answers as it does alone."""
    requests = [r for n in (1, 6, 3) for r in greedy(max_new_tokens=n)]
    free = engine().generate(greedy())
    found = engine().generate(requests, batch_size=3)
    assert found == [ids[:n] for n in (1, 6, 3) for ids in free]


def test_progress_grows_to_the_answer():
    whole = engine().generate(greedy())
    seen = {i: [] for i in range(4)}
    for i, answer, over in engine().run(greedy(), chunk=3, progress=True):
        assert answer.ids[: len(seen[i])] == seen[i]
        seen[i] = answer.ids
        assert over == (len(answer.ids) == 8)
    assert [seen[i] for i in range(4)] == whole


def test_a_rule_of_the_host_ends_its_row_alone():
    whole = engine().generate(greedy())
    requests = greedy()
    halt = lambda ids: 2 if len(ids) >= 2 else None  # noqa: E731
    requests[1] = Request(requests[1].tokens, requests[1].visual, 8, halt=halt)
    found = [answers[0] for answers in engine().answer(requests)]
    assert [a.ids for a in found] == [whole[0], whole[1][:2], *whole[2:]]
    assert [a.stopped for a in found] == [False, True, False, False]


def test_log_probabilities_are_those_of_a_whole_forward_pass():
    module, (_, _, whole) = model(), programs(None)
    (answer,) = engine().answer(greedy(1))[0]
    row = [*greedy(1)[0].tokens, *answer.ids]
    tokens = np.zeros((4, 64), np.int32)
    tokens[0, : len(row)] = row
    hidden = whole(module.llm.embed_tokens(jnp.asarray(tokens)), jnp.full(4, len(row)))
    scores = jax.nn.log_softmax(module.llm.logits(hidden[0]))
    at = np.arange(len(row) - len(answer.ids), len(row))
    expected = np.asarray(scores)[at - 1, answer.ids]
    np.testing.assert_allclose(answer.logprobs, expected, rtol=1e-3, atol=1e-4)
    assert answer.score == pytest.approx(sum(answer.logprobs))


def test_buckets():
    assert [bucket(n) for n in (1, 32, 33, 64, 65, 96, 97, 129, 193, 385)] == [
        32, 32, 64, 64, 96, 96, 128, 192, 256, 512,
    ]  # fmt: skip
    assert all(n <= bucket(n) <= max(32, 2 * n) for n in range(1, 3000))


def test_nothing_to_do():
    assert engine().generate([]) == []


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("count", "int8"), [(1, False), (4, False), (4, True)])
def test_decoding_copies_neither_weights_nor_cache(dtype, count, int8):
    """What the compiled loop needs beside its arguments is small; XLA likes to keep converted or
    transposed copies of what a loop does not change (27 GB for a 7B in bfloat16)."""
    llm = LlmConfig(vocab=4096, width=128, layers=2, heads=4, kv_heads=4, head_dim=32, ffn=512)
    vision = VisionConfig(image_size=28, patch_size=14, width=8, depth=1, heads=2, mlp=8)
    config = ModelConfig(vision=vision, qformer=None, llm=llm)
    graphdef, state = nnx.split(abstract_model(config, stacked=False))
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, dtype if a.ndim > 1 else jnp.float32), state
    )
    module = nnx.merge(graphdef, state)
    module.llm.int8_cache = int8
    runner = Engine(module)
    rows = runner._rows([Request([1, 2], max_new_tokens=500)] * count)
    plan = stages_of([SamplingParams()], llm.vocab)
    start = partial(runner._start_program, cache_length=512, room=512, plan=plan)
    loop = jax.eval_shape(start, runner._leaves, rows)
    compiled = runner._decode.lower(runner._leaves, loop, 5, plan).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    cache = jax.tree.leaves(loop.cache)
    if int8:  # XLA on CPU makes floats of one layer's keys and values at a time
        assert temporary < 1.25 * 4 * sum(a.size for a in cache) / llm.layers
        return
    matrices = [a for a in runner._leaves if a.ndim > 1]
    assert temporary < sum(a.size * a.dtype.itemsize for a in matrices) / 4
    assert temporary < sum(a.size * a.dtype.itemsize for a in cache) / 4
