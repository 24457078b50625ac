"""The scheduler: answers equal those of `generate`, fair order, cancellation, limits, failures."""

import asyncio
import hashlib
from dataclasses import replace

import numpy as np
import pytest
from helpers import blip2_reference, tiny

import minigpt4_jax
from minigpt4_jax.inference import batch_shapes
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.serving.errors import RequestError
from minigpt4_jax.serving.jobs import DeviceCall, Generation, ImageInput
from minigpt4_jax.serving.scheduler import Scheduler, SchedulerConfig
from minigpt4_jax.serving.warm_up import warm_up

CONFIG = SchedulerConfig(
    max_rows=8, max_queue=16, context=256, max_new_tokens=64, prefill_tokens=64, cache_tokens=1024
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny.write_random_model(tmp_path_factory.mktemp("scheduler") / "model", llm_layers=1)
    return minigpt4_jax.load(folder, dtype="float32")


@pytest.fixture
def scheduler(model):
    scheduler = Scheduler(model, CONFIG)
    scheduler.start()
    yield scheduler
    scheduler.stop(0)


def image(seed, size=28):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return ImageInput(hashlib.sha256(pixels.tobytes()).digest(), pixels)


def generation(model, prompt, images=(), *, client="", timeout=100, streamed=False, **options):
    config = GenerationConfig(**{"max_new_tokens": 12} | options)
    pixels = [i.pixels for i in images]
    (request,) = model.prepare_requests([pixels], [prompt], config, [None])
    return Generation(request, images, client=client, timeout=timeout, streamed=streamed)


def expected(model, prompt, images=(), **options):
    pixels = [i.pixels for i in images]
    (outputs,) = model.generate_details([pixels], [prompt], **{"max_new_tokens": 12} | options)
    return outputs[0].ids


PROMPTS = [
    ("what is it", 0, {}),
    ("<Img><ImageHere></Img> a red square", 1, {"temperature": 1.0, "top_k": 50, "seed": 3}),
    ("a word " * 30, 0, {"temperature": 0.7, "seed": 5, "repetition_penalty": 1.2}),
    ("<ImageHere> and <ImageHere>" + " more" * 50, 2, {"max_new_tokens": 40}),
    ("green", 0, {"temperature": 1.0, "top_p": 0.9, "seed": 9, "stop": ("a",)}),
]


def test_answers_equal_those_of_generate(model, scheduler):
    async def main():
        jobs = []
        for n, (prompt, images, options) in enumerate(PROMPTS * 3):
            jobs.append(generation(model, prompt, [image(i + n) for i in range(images)], **options))
            scheduler.submit(jobs[-1])
            await asyncio.sleep(0.01 * (n % 3))
        return jobs, await asyncio.gather(*(job.result() for job in jobs))

    jobs, found = asyncio.run(main())
    together = model.answer_requests([job.request for job in jobs])
    assert [completion.ids for completion in found] == [outputs[0].ids for outputs in together]
    prompt, _, options = PROMPTS[1]
    assert found[1].ids == expected(model, prompt, [image(1)], **options)


@blip2_reference.NEEDS_BLIP2
def test_an_encoder_reads_a_prompt_longer_than_a_piece(monkeypatch, compiled):
    monkeypatch.setattr(batch_shapes, "PROMPTS", (64,))  # and the context: few programs
    model = blip2_reference.load("flant5")
    picture = image(0, model.config.vision.image_size)
    config = replace(
        CONFIG, max_rows=1, context=128, cache_tokens=128, max_new_tokens=8, encode_images=1
    )
    scheduler = Scheduler(model, config)
    scheduler.start()
    try:

        async def main():
            job = generation(model, "a photo of " * 20, [picture], max_new_tokens=6)
            assert len(job.request.tokens) > config.prefill_tokens
            await warm_up(scheduler)
            compiled.clear()
            scheduler.submit(job)
            return await job.result()

        found = asyncio.run(main())
        assert not compiled
    finally:
        scheduler.stop(0)
    assert found.ids == expected(model, "a photo of " * 20, [picture], max_new_tokens=6)


def test_a_prompt_continues_from_what_another_began_with(model, scheduler):
    conversation = "<Img><ImageHere></Img>" + " first words" * 12
    longer = conversation + " and then more"

    async def ask(prompt, picture):
        job = generation(model, prompt, [picture], temperature=1.0, seed=4)
        scheduler.submit(job)
        return job, await job.result()

    async def main():
        return [
            await ask(conversation, image(0)),
            await ask(longer, image(0)),
            await ask(longer, image(1)),
        ]

    (first, _), (second, reused), (other, _) = asyncio.run(main())
    assert first.cached_tokens == 0 and other.cached_tokens < 10  # another image
    assert second.cached_tokens > len(first.request.tokens) - 10
    assert reused.ids == expected(model, longer, [image(0)], temperature=1.0, seed=4)


def test_an_image_is_encoded_once(model, scheduler, monkeypatch):
    encoded, encode = [], model.start_encoding
    monkeypatch.setattr(model, "start_encoding", lambda p: encoded.extend(p) or encode(p))

    async def main():
        for prompt, images in [("<ImageHere> a", [1]), ("<ImageHere><ImageHere> b", [2, 1])]:
            job = generation(model, prompt, [image(seed) for seed in images])
            scheduler.submit(job)
            await job.result()
        call = DeviceCall(lambda visual: visual, [image(2), image(3)])
        scheduler.submit(call)
        return await call.result()

    visual = asyncio.run(main())
    assert len(encoded) == 3
    alone = [model.encode_pixels([image(seed).pixels])[0] for seed in (2, 3)]
    np.testing.assert_allclose(visual, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("when", ["dispatched", "read"])
def test_images_of_waiting_requests_are_encoded_together(model, monkeypatch, when):
    """One of them with which the device fails ends alone."""
    calls, start = [], model.start_encoding
    bad = image(3).pixels

    def fail():
        raise RuntimeError("bad image")

    def record(pixels):
        calls.append(len(pixels))
        if not any((p == bad).all() for p in pixels):
            return start(pixels)
        return fail if when == "read" else fail()

    async def main():
        monkeypatch.setattr(model, "start_encoding", record)
        scheduler = Scheduler(model, CONFIG)
        jobs = [generation(model, "<ImageHere> a", [image(n)]) for n in range(6)]
        scheduler.submit(*jobs)
        while scheduler._busy():
            scheduler._step()
        results = await asyncio.gather(*(job.result() for job in jobs), return_exceptions=True)
        # 0 and 1; 2 and 3 fail, so 2 alone; 3 and 4 fail, so 3 alone, which fails; 4 and 5
        assert calls == [2, 2, 1, 2, 1, 2]
        assert [isinstance(result, RequestError) for result in results] == [
            n == 3 for n in range(6)
        ]
        return results[4]

    answer = asyncio.run(main())
    assert answer.ids == expected(model, "<ImageHere> a", [image(4)])


def test_running_answers_go_on_while_images_are_encoded(model, monkeypatch):
    events, start = [], model.start_encoding

    def record(pixels):
        events.append("start")
        result = start(pixels)
        return lambda: events.append("finish") or result()

    async def main():
        monkeypatch.setattr(model, "start_encoding", record)
        scheduler = Scheduler(model, CONFIG)
        decode = scheduler.batch._runner.decode
        monkeypatch.setattr(
            scheduler.batch._runner, "decode", lambda *a: events.append("decode") or decode(*a)
        )
        scheduler.submit(generation(model, "a word"))
        scheduler._step()
        scheduler.submit(generation(model, "<ImageHere> a", [image(0)]))
        for _ in range(2):
            scheduler._step()

    asyncio.run(main())
    assert events == ["decode", "start", "decode", "finish", "decode"]


def test_steps_are_short_while_rows_are_filled(model, monkeypatch):
    async def main():
        scheduler = Scheduler(model, CONFIG)
        step, steps = scheduler.batch.stream_step, []

        def record(n, *, until_row_ends):
            steps.append((n, until_row_ends))
            return step(n, until_row_ends=until_row_ends)

        monkeypatch.setattr(scheduler.batch, "stream_step", record)
        scheduler.submit(*(generation(model, "<ImageHere>", [image(n)]) for n in range(10)))
        while len(steps) < 5:
            scheduler._step()
        return steps, scheduler.num_running, len(scheduler.queue)

    # two images are encoded in a step, and there are eight rows; steps end with a row, which makes room
    assert asyncio.run(main()) == ([(1, True), (1, True), (1, True), (4, True), (4, True)], 8, 2)


def test_a_stream_grows_and_ends_at_a_stop_text(model, scheduler):
    full = expected(model, "tell me", max_new_tokens=40)
    text = model.tokenizer.decode(full)
    stop = text[len(text) // 2 : len(text) // 2 + 4]

    async def main():
        job = generation(model, "tell me", streamed=True, max_new_tokens=40, stop=(stop,))
        scheduler.submit(job)
        return [(completion, finished) async for completion, finished in job.updates()]

    updates = asyncio.run(main())
    lengths = [len(completion.ids) for completion, _ in updates]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1] < 40
    assert [finished for _, finished in updates] == [False] * (len(updates) - 1) + [True]
    last = updates[-1][0]
    assert last.hit_stop and last.ids == full[: lengths[-1]]
    assert last.ids == expected(model, "tell me", max_new_tokens=40, stop=(stop,))


def test_cancelled_and_expired_requests_make_room(model, scheduler):
    async def main():
        gone = generation(model, "a", streamed=True, max_new_tokens=64)
        scheduler.submit(gone)
        updates = gone.updates()
        await anext(updates)
        await updates.aclose()  # as when a client leaves
        late = generation(model, "b", timeout=0)
        scheduler.submit(late)
        with pytest.raises(RequestError, match="not answered within 0 s"):
            await late.result()
        after = generation(model, "c")
        scheduler.submit(after)
        await after.result()
        return gone

    gone = asyncio.run(main())
    assert gone.cancelled and gone.finished is None
    assert gone not in scheduler._running


def test_the_queue_is_bounded_and_lengths_are_checked(model):
    async def main():
        scheduler = Scheduler(model, replace(CONFIG, max_queue=2))  # not started
        scheduler.submit(generation(model, "a"))
        with pytest.raises(RequestError) as full:
            scheduler.submit(generation(model, "b"), generation(model, "c"))
        assert (full.value.status, full.value.code) == (429, "queue_full")
        assert full.value.retry_after >= 1 and len(scheduler.queue) == 1  # all of them or none
        with pytest.raises(RequestError, match="context of 256 tokens"):
            scheduler.submit(generation(model, "word " * 100, max_new_tokens=60))
        with pytest.raises(RequestError, match="at most 64"):
            scheduler.submit(generation(model, "a", max_new_tokens=65))

    asyncio.run(main())


def test_clients_take_turns(model):
    async def main():
        scheduler = Scheduler(model, replace(CONFIG, max_rows=1))
        jobs = [generation(model, "a", client=client) for client in "aaaab"]
        scheduler.submit(*jobs)
        order = []
        running = []
        while waiting := scheduler.queue.in_order(running):
            work = waiting[0]
            scheduler.queue.remove(work)
            running.append(work)
            order.append(work.client)
        return order

    assert asyncio.run(main()) == ["a", "b", "a", "a", "a"]


def test_a_prompt_that_the_device_cannot_process_ends_alone(model, scheduler, monkeypatch):
    prefill = model.engine.prefill

    def failing(requests, *args):
        if len(requests[0].tokens) == 7:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return prefill(requests, *args)

    monkeypatch.setattr(model.engine, "prefill", failing)

    async def main():
        good = [generation(model, "hello there friend", max_new_tokens=40) for _ in range(3)]
        bad = generation(model, "x")
        bad.request = replace(bad.request, tokens=[1, 5, 6, 7, 8, 9, 10])
        scheduler.submit(*good, bad)
        with pytest.raises(RequestError, match="RESOURCE_EXHAUSTED") as error:
            await bad.result()
        assert error.value.status == 500
        return [(await job.result()).ids for job in good]

    want = expected(model, "hello there friend", max_new_tokens=40)
    assert asyncio.run(main()) == [want] * 3


def test_when_decoding_fails_the_request_to_blame_ends_and_the_others_go_on(
    model, scheduler, monkeypatch
):
    decode = model.engine.decode

    def failing(state, *args):
        if any(job.client == "poison" for job in scheduler._running):
            raise RuntimeError("INTERNAL: a kernel failed")
        return decode(state, *args)

    monkeypatch.setattr(model.engine, "decode", failing)
    options = {"temperature": 1.0, "seed": 2, "max_new_tokens": 60}

    async def main():
        good = [generation(model, f"number {n}", streamed=True, **options) for n in range(2)]
        scheduler.submit(*good)
        updates = [job.updates() for job in good]
        for update in updates:
            await anext(update)
        bad = generation(model, "x", client="poison")
        gone = generation(model, "y")  # leaves while the others are begun again
        scheduler.submit(gone, bad)
        gone.cancel()
        with pytest.raises(RequestError, match="a kernel failed"):
            await bad.result()
        return [[completion.ids async for completion, _ in update] for update in updates]

    for n, found in enumerate(asyncio.run(main())):
        assert found[-1] == expected(model, f"number {n}", **options)
        assert list(map(len, found)) == sorted(map(len, found))  # nothing was streamed twice


def test_rows_that_are_not_finite_end_alone_and_are_not_reused(model, scheduler):
    async def main():
        bad = generation(model, "<ImageHere> a long prompt for the cache of prefixes", [image(0)])
        good = generation(model, "fine")
        scheduler.submit(good)
        scheduler.images._encoded[image(0).digest] = np.full((3, 24), np.nan, np.float32)
        scheduler.submit(bad)
        return await bad.result(), await good.result()

    bad, good = asyncio.run(main())
    assert bad.nonfinite and bad.ids == []
    assert good.ids == expected(model, "fine")
    assert len(scheduler.prefixes._entries) == 1  # of the good one


def test_stopping_answers_what_was_accepted(model):
    async def main():
        scheduler = Scheduler(model, CONFIG)
        scheduler.start()
        jobs = [generation(model, "a", seed=n, max_new_tokens=30) for n in range(12)]
        scheduler.submit(*jobs)
        finished = asyncio.create_task(asyncio.to_thread(scheduler.stop, 60))
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError) as refused:
            scheduler.submit(generation(model, "b"))
        assert refused.value.status == 503
        answers = [await job.result() for job in jobs]
        return scheduler, await finished, answers

    scheduler, finished, answers = asyncio.run(main())
    assert finished and not scheduler.healthy
    assert [len(answer.ids) > 0 for answer in answers] == [True] * 12
