"""The generation engine: token ids in, token ids out, by continuous batching or beam search."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice

import jax
import numpy as np

from minigpt4_jax.inference.beam_search import Hypotheses, SearchInputs
from minigpt4_jax.inference.prefix_cache import PrefixCache
from minigpt4_jax.inference.requests import Completion, Progress, Request, bucket, bucket_sizes
from minigpt4_jax.inference.runner import UNLIMITED, ModelRunner
from minigpt4_jax.inference.running_batch import CHUNK_STEPS, RunningBatch
from minigpt4_jax.utils.rounding import next_power_of_two

BATCH_SIZE = 32  # rows decoded together


class Engine(ModelRunner):
    """Answers to requests by the compiled programs of one model."""

    def generate(
        self, requests: Sequence[Request], batch_size: int = BATCH_SIZE
    ) -> list[list[int]]:
        """New ids of each request, in order, including the stop sequence that ended them."""
        return [completions[0].ids for completions in self.answer(requests, batch_size)]

    def answer(
        self,
        requests: Sequence[Request],
        batch_size: int = BATCH_SIZE,
        prefix_cache: PrefixCache | None = None,
    ) -> list[list[Completion]]:
        """The completions of each request, in order: one, or `num_return_sequences` of beam search.

        prefix_cache: see `run`; beam search does not use it.
        """
        completions: list[list[Completion]] = [[] for _ in requests]
        plain = [i for i, r in enumerate(requests) if r.beam_search.num_beams == 1]
        run = self.run([requests[i] for i in plain], batch_size, prefix_cache=prefix_cache)
        for progress in run:
            completions[plain[progress.key]] = [progress.completion]
        searched = [i for i, r in enumerate(requests) if r.beam_search.num_beams > 1]
        results = self.search([requests[i] for i in searched], batch_size)
        for i, best in zip(searched, results, strict=True):
            completions[i] = best
        return completions

    def run(
        self,
        requests: Iterable[Request],
        batch_size: int = BATCH_SIZE,
        *,
        chunk: int = CHUNK_STEPS,
        progress: bool = False,
        sized_for: Sequence[Request] | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> Iterator[Progress]:
        """Yield each request's completion as it finishes; its slot then takes the next request.

        progress: also yield the completions so far of unfinished requests, after every `chunk`
        steps. sized_for: with it, `requests` may be a lazy iterable, from which a request is taken
        when a slot is free. Each must fit the bucket sizes and sampling stages of these.
        prefix_cache: prompts are processed from where they first differ from it, and the caches of
        the requests are stored in it, also if the iterator is closed early.
        """
        if sized_for is None:
            sized_for = requests = list(requests)
        if not sized_for:
            return
        num_rows = min(batch_size, len(sized_for))
        batch = RunningBatch(
            self, num_rows, min_rows=num_rows, min_sizes=self.bucket_sizes(sized_for, num_rows),
            stages=self.stages(sized_for), prefix_cache=prefix_cache, report_progress=progress,
            share_prompts=prefix_cache is None and len(sized_for) > num_rows,
        )  # fmt: skip
        in_chunks = progress or any(request.stop_check for request in sized_for)
        indexed = enumerate(requests)
        try:
            while True:
                # One more than fits: only while a request waits, the host must look between chunks.
                missing = max(0, batch.num_free + 1 - batch.num_waiting)
                for index, request in islice(indexed, missing):
                    batch.add(index, request)
                if batch.is_idle:
                    return
                waits = batch.num_waiting > 0
                steps = chunk if in_chunks or waits else UNLIMITED
                for news in batch.stream_step(steps, until_row_ends=waits):
                    if news.error is not None:
                        raise news.error
                    yield news
        finally:
            batch.close()

    def search(
        self, requests: Sequence[Request], batch_size: int = BATCH_SIZE
    ) -> list[list[Completion]]:
        """The best `num_return_sequences` completions of each request by beam search, best first.

        batch_size: beams at a time, of all requests together.
        """
        completions: list[list[Completion]] = [[] for _ in requests]
        for batch in self.search_batches(requests, batch_size):
            found = self.search_batch([requests[i] for i in batch])
            best, nonfinite = Hypotheses(*map(np.asarray, found[0])), np.asarray(found[1])
            for row, i in enumerate(batch):
                num_answers = requests[i].beam_search.num_return_sequences
                completions[i] = _completions(best, row, bool(nonfinite[row]))[:num_answers]
        return completions

    @staticmethod
    def search_batches(
        requests: Sequence[Request], batch_size: int = BATCH_SIZE
    ) -> list[list[int]]:
        """The indices of the requests that `search` searches together, in its order."""
        # Requests with equally many beams share a program.
        order = sorted(
            range(len(requests)),
            key=lambda i: (requests[i].beam_search.num_beams, len(requests[i].tokens)),
        )
        batches: list[list[int]] = []
        for num_beams, same in groupby(order, lambda i: requests[i].beam_search.num_beams):
            indices, size = list(same), max(1, batch_size // num_beams)
            batches += [indices[n : n + size] for n in range(0, len(indices), size)]
        return batches

    def search_batch(self, requests: Sequence[Request]) -> tuple[Hypotheses, jax.Array]:
        """The hypotheses of requests with equally many beams, best first, and which rows had logits that were
        NaN or infinite; on the device."""
        # The search takes num_stops more candidates of every beam, so this size is not rounded up much.
        num_stops = max([1, *(len(request.stop_sequences) for request in requests)])
        sizes = bucket_sizes(requests)._replace(num_stops=next_power_of_two(num_stops))
        inputs = self.batch_inputs(requests, sizes)
        configs = [request.beam_search for request in requests]
        configs += [configs[0]] * (len(inputs.lengths) - len(configs))  # padding rows
        search_inputs = SearchInputs(
            inputs.lengths, inputs.max_new_tokens, inputs.stop_sequences, inputs.sampling,
            np.array([c.length_penalty for c in configs], np.float32),
            np.array([c.early_stopping for c in configs]),
        )  # fmt: skip
        stages = self.stages(requests)
        max_new_tokens = bucket(int(inputs.max_new_tokens.max()), 16)
        found: tuple[Hypotheses, jax.Array] = self._search(
            self._leaves, inputs.tokens, inputs.visual, search_inputs, configs[0].num_beams,
            max_new_tokens, stages,
        )  # fmt: skip
        return found


def _completions(best: Hypotheses, row: int, nonfinite: bool) -> list[Completion]:
    """The hypotheses of one row, on the host."""
    hypotheses = zip(*(a[row] for a in best), strict=True)
    return [
        Completion(
            ids[:length].tolist(),
            logprobs[:length].tolist(),
            bool(hit_stop),
            float(score),
            nonfinite,
        )
        for ids, logprobs, length, score, hit_stop in hypotheses
    ]
