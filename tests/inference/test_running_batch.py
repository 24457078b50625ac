"""A running batch that requests join and leave at any time: the answers are those of single requests."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.small_engine import VOCAB, P, engine, greedy_requests, ids_alone, prompt

from minigpt4_jax.errors import UserError
from minigpt4_jax.inference import running_batch
from minigpt4_jax.inference.batch_shapes import BatchShapes
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.inference.running_batch import RunningBatch
from minigpt4_jax.inference.sampling import SamplingParams


def run(batch, steps=2, limit=300):
    """Step until the batch is idle: the progress of each key, in order."""
    news = {}
    for _ in range(limit):
        if batch.is_idle:
            return news
        for progress in batch.step(steps):
            news.setdefault(progress.key, []).append(progress)
    raise AssertionError("the batch does not become idle")


def answers(news):
    """The ids of finished requests, by key."""
    assert all(p.error is None for of_key in news.values() for p in of_key)
    return {key: of_key[-1].completion.ids for key, of_key in news.items() if of_key[-1].finished}


def expected(requests):
    return dict(enumerate(map(ids_alone, requests)))


def mixed_requests():
    """Requests of many lengths and limits, greedy and sampled, with and without images."""
    rng = np.random.default_rng(3)
    shapes = [(5, 0, 8), (70, 1, 20), (2, 2, 1), (17, 0, 40), (40, 1, 6), (100, 0, 70)]
    sampled = SamplingParams(temperature=1.5, top_k=20, repetition_penalty=1.3)
    return [
        Request(*prompt(rng, n, i), limit, sampled if k % 2 else SamplingParams(), seed=k)
        for k, (n, i, limit) in enumerate(shapes)
    ]


@pytest.mark.parametrize("prefill_tokens", [None, 32], ids=["whole prompts", "in pieces"])
def test_requests_that_join_a_running_batch(prefill_tokens):
    """The arrays grow for longer requests, and shrink when few are left."""
    requests = mixed_requests()
    batch = RunningBatch(engine(), 4, prefill_tokens=prefill_tokens)
    news, sizes = {}, set()
    for key, request in enumerate(requests):
        batch.add(key, request)
        for progress in batch.step(2):
            news.setdefault(progress.key, []).append(progress)
        sizes.add(batch.cache_tokens)
    for key, of_key in run(batch).items():
        news.setdefault(key, []).extend(of_key)
    assert answers(news) == expected(requests)
    assert len(sizes) > 2 and batch.cache_tokens == 0
    for of_key in news.values():  # the first token is reported when the prompt is processed
        assert len(of_key[0].completion.ids) == 1
        lengths = [len(p.completion.ids) for p in of_key]
        assert lengths == sorted(lengths)


def test_a_long_prompt_does_not_stall_the_running_answers():
    rng = np.random.default_rng(0)
    short, long = Request([3, 4, 5], max_new_tokens=30), Request(*prompt(rng, 300, 2), 4)
    batch = RunningBatch(engine(), prefill_tokens=64)
    batch.add("short", short)
    batch.step(1)
    batch.add("long", long)
    lengths = []  # of the short answer, until the long prompt is processed
    while not lengths or lengths[-1] is not None:
        news = {progress.key: len(progress.completion.ids) for progress in batch.step(1)}
        lengths.append(None if "long" in news else news["short"])
    assert len(lengths) >= 5  # pieces of 64 of 306 tokens
    assert lengths[:-1] == list(range(lengths[0], lengths[0] + len(lengths) - 1))  # one a step
    assert answers(run(batch)) == {
        key: ids_alone(request) for key, request in (("short", short), ("long", long))
    }


def test_running_answers_do_not_wait_for_the_prompt_that_is_processed(monkeypatch):
    """Their tokens are told before those of the new prompt are read, which waits for the device."""
    batch, read = RunningBatch(engine()), []
    original = running_batch.read_snapshot
    monkeypatch.setattr(
        running_batch, "read_snapshot", lambda *a: read.append("snapshot") or original(*a)
    )
    batch.add("running", Request([3, 4, 5], max_new_tokens=9))
    batch.step(1)
    batch.add("new", Request([5, 6], max_new_tokens=9))
    read.clear()
    told = [(news.key, len(read)) for news in batch.stream_step(1)]
    assert told == [("running", 1), ("new", 2)]


def test_a_cancelled_request_leaves_the_others_alone():
    requests = greedy_requests(max_new_tokens=12)
    batch = RunningBatch(engine(), 2)
    for key, request in enumerate(requests):
        batch.add(key, request)
    batch.step(2)
    batch.step(2)
    assert (batch.num_running, batch.num_waiting, batch.num_free) == (2, 2, 0)
    assert batch.cancel(0) and batch.cancel(2) and not batch.cancel("unknown")
    news = run(batch)
    assert {0, 2}.isdisjoint(news) and not batch.cancel(1)
    assert answers(news) == {k: ids for k, ids in expected(requests).items() if k in (1, 3)}


def test_the_cache_is_limited():
    """Requests wait until they fit; one that never fits is refused."""
    requests = [Request([1 + k] * (20 + 30 * k), max_new_tokens=8) for k in range(4)]
    batch = RunningBatch(engine(), max_cache_tokens=256)
    for key, request in enumerate(requests):
        batch.add(key, request)
    with pytest.raises(UserError, match="exceed the cache of 256 tokens"):
        batch.add("long", Request([1] * 300))
    news = {}
    while not batch.is_idle:
        for progress in batch.step(4):
            news.setdefault(progress.key, []).append(progress)
        assert batch.used_cache_tokens <= batch.cache_tokens <= 256
    assert answers(news) == expected(requests)


def test_prompts_continue_from_the_prefix_cache(monkeypatch):
    """Turns of several conversations in one batch, each from its own cache."""
    resumed, resume = [], engine()._resume
    monkeypatch.setattr(engine(), "_resume", lambda *a: resumed.append(a[3]) or resume(*a))
    rng, prefix_cache = np.random.default_rng(1), PrefixCache(max_entries=3)
    batch = RunningBatch(engine(), prefix_cache=prefix_cache)
    requests = [Request(*prompt(rng, 60 + k, 1), 6) for k in range(3)]
    for _ in range(2):
        for key, request in enumerate(requests):
            batch.add(key, request)
        ids = answers(run(batch))
        assert ids == expected(requests)
        requests = [
            replace(r, tokens=[*r.tokens, *ids[k], *rng.integers(1, 60, 5).tolist()])
            for k, r in enumerate(requests)
        ]
    assert resumed == [60 + 3 + k + 5 for k in range(3)]  # but the last token of the answer
    assert prefix_cache.num_tokens == 3 * 96  # slots for 74 to 76 tokens


def test_prompts_continue_from_those_before_them(monkeypatch):
    """As in an evaluation: the same words begin all prompts, and some have the same image. What is not
    finite in one image, and the length of one prompt, change nothing in the others."""
    resumed, resume = [], engine()._resume
    monkeypatch.setattr(engine(), "_resume", lambda *a: resumed.append(a[3]) or resume(*a))
    rng = np.random.default_rng(4)
    words, image = prompt(rng, 70)[0], prompt(rng, 0, 1)
    other, broken = prompt(rng, 0, 1)[1], np.full_like(image[1], np.nan)

    def request(visual, length):
        return Request([*words, *image[0], *prompt(rng, length)[0]], visual, 5)

    requests = [
        request(image[1], 5), request(image[1], 9), request(broken, 50), request(other, 6),
        request(other, 100), request(image[1], 8), Request(prompt(rng, 50)[0], max_new_tokens=5),
    ]  # fmt: skip
    batch = RunningBatch(engine(), 2, share_prompts=True)
    for key, one in enumerate(requests):
        batch.add(key, one)
    news = run(batch)
    # The padded rest, here of 64 tokens, lies within the cache of 128 slots, so it may repeat some tokens.
    assert resumed == [70 + P, 128 - 64, 70, 70 + P, 70]
    assert news[2][-1].completion.nonfinite
    assert answers(news) == expected(requests)


def test_decoding_stops_when_a_row_ends():
    requests = [
        replace(r, max_new_tokens=n) for r, n in zip(greedy_requests(3), (9, 3, 6), strict=True)
    ]
    state, stages = engine().prefill(requests), engine().stages(requests)
    generated = []
    for _ in range(4):
        state = engine().decode(state, stages, 30, max_ended=1)
        generated.append(engine().snapshot(state).numbers[:3, 0].tolist())
    assert generated == [[3, 3, 3], [6, 3, 6], [9, 3, 6], [9, 3, 6]]


def test_a_row_that_ends_makes_room_at_once():
    """The others are not decoded on while a request waits for the row's place."""
    batch = RunningBatch(engine(), 2)
    for key, limit in enumerate((30, 4, 4)):
        batch.add(key, Request([3 + key], max_new_tokens=limit))
    lengths = {}
    while 2 not in lengths:
        for progress in batch.step(16, until_row_ends=True):
            lengths[progress.key] = len(progress.completion.ids)
    assert lengths[1] == 4 and lengths[0] <= 4 + 16


def test_a_prompt_that_fails_ends_alone(monkeypatch):
    requests = greedy_requests()
    batch = RunningBatch(engine(), 4, prefill_tokens=64)
    prefill = engine()._prefill

    def failing(leaves, inputs, *args):
        if inputs.lengths[0] == len(requests[1].tokens):
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return prefill(leaves, inputs, *args)

    monkeypatch.setattr(engine(), "_prefill", failing)
    for key, request in enumerate(requests):
        batch.add(key, request)
    news = run(batch)
    (failed,) = news.pop(1)
    assert failed.finished and str(failed.error) == "RESOURCE_EXHAUSTED"
    monkeypatch.undo()
    assert answers(news) == {k: ids for k, ids in expected(requests).items() if k != 1}


def test_after_an_exception_the_batch_starts_again(monkeypatch):
    requests = greedy_requests(2)
    batch = RunningBatch(engine())
    batch.add("a", requests[0])
    batch.step(1)
    batch.add("b", requests[1])
    with monkeypatch.context() as context:
        context.setattr(engine(), "_decode", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch.step(1)
    assert batch.abort() == ["a", "b"] and batch.is_idle and batch.cache_tokens == 0
    batch.add("c", requests[0])
    assert answers(run(batch)) == {"c": expected(requests[:1])[0]}


def test_beam_search_is_refused():
    with pytest.raises(UserError, match="no beam search"):
        RunningBatch(engine()).add(0, Request([1], beam_search=BeamSearchConfig(2)))


def test_a_row_of_nan_leaves_nothing_in_its_slot():
    """A mask does not remove NaN: 0 * NaN is NaN."""
    rng = np.random.default_rng(5)
    beside = Request(*prompt(rng, 100), max_new_tokens=60)
    poisoned = Request(*prompt(rng, 90, 1), max_new_tokens=4)
    poisoned = replace(poisoned, visual=np.full_like(poisoned.visual, np.nan))
    short = Request(*prompt(rng, 5), max_new_tokens=40)
    batch = RunningBatch(engine(), 2)
    for key, request in [("beside", beside), ("poisoned", poisoned), ("short", short)]:
        batch.add(key, request)
    news = run(batch)
    assert news["poisoned"][-1].completion.nonfinite
    assert news["short"][-1].completion.ids == ids_alone(short)


def test_a_server_reuses_a_prefix_where_that_saves_padded_tokens():
    """Of its few sizes: 40 tokens take a program of 48, or of 64 after a cached beginning."""
    shapes = BatchShapes(VOCAB, max_rows=2, context=256, max_new_tokens=16, prefill_tokens=64)
    cached = []
    for begin, total in ((4, 40), (20, 40), (4, 64), (30, 64)):
        batch = RunningBatch(
            engine(), 2, prefill_tokens=64, prefix_cache=PrefixCache(4), shapes=shapes
        )
        for rest in (7, 8):
            tokens = [5] * begin + [rest] * (total - begin)
            batch.add(rest, Request(tokens, max_new_tokens=2))
            news = run(batch)
        cached.append(news[8][-1].num_cached)
        assert answers(news) == {8: ids_alone(Request(tokens, max_new_tokens=2))}
    assert cached == [0, 20, 0, 0]


def test_a_server_has_finer_cache_lengths_for_many_rows():
    shapes = BatchShapes(VOCAB, max_rows=32, context=512, max_new_tokens=64, prefill_tokens=64)
    request = Request([5] * 130, max_new_tokens=40)
    lengths = {rows: shapes.sizes([request], rows).cache_length for rows in shapes.rows}
    assert lengths == {1: 256, 8: 256, 32: 192}
    assert shapes.cache_lengths == [128, 256, 512]
    assert shapes.cache_lengths_of(32) == [128, 192, 256, 384, 512]
    batch = RunningBatch(
        engine(), 32, prefill_tokens=64, prefix_cache=PrefixCache(32), shapes=shapes
    )
    requests = [Request([5] * 126 + [n] * 4, max_new_tokens=60) for n in range(9)]
    for key, request in enumerate(requests):
        batch.add(key, request)
    sizes, news = set(), {}
    while not batch.is_idle:
        for progress in batch.step(1):
            news.setdefault(progress.key, []).append(progress)
        sizes.add(batch.cache_tokens)
    assert 32 * 192 in sizes
    assert answers(news) == expected(requests)
    # what was cached of a row among many is as long as a cache of one row
    batch.add("again", Request([5] * 126 + [8] * 4 + [1] * 4, max_new_tokens=3))
    assert run(batch)["again"][-1].num_cached >= 126
