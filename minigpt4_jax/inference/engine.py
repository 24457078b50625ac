"""The generation engine: token ids in, token ids out, by compiled programs of one model.

Every row has its own length, limits, stop sequences, sampling parameters and PRNG key, all of them
arrays in `DecodeState`, so requests of any kind share a program. Sizes are rounded up to buckets,
so that few programs are compiled. The cache is donated, so that decoding does not copy it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.inference import programs
from minigpt4_jax.inference.beam_search import Hypotheses, SearchInputs
from minigpt4_jax.inference.decode_state import (
    PRNG,
    BatchInputs,
    DecodeState,
    Snapshot,
    finish_rows,
    insert,
    take_snapshot,
)
from minigpt4_jax.inference.prefix_cache import PrefixCache, suffix
from minigpt4_jax.inference.requests import (
    BucketSizes,
    Completion,
    Progress,
    Request,
    bucket,
    bucket_sizes,
    stack_visual,
)
from minigpt4_jax.inference.running_batch import RunningBatch
from minigpt4_jax.inference.sampling import SamplingStages, required_stages, stack_sampling_params
from minigpt4_jax.inference.stop_sequences import stack_stop_sequences
from minigpt4_jax.models.kv_cache import KVCache, grow_cache
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.parallel.sharding import with_mesh
from minigpt4_jax.utils.rounding import next_power_of_two

BATCH_SIZE = 32  # rows decoded together
CHUNK_STEPS = 16  # decoding steps between two decisions of the host, if it has any to make
UNLIMITED_STEPS = 1 << 30  # more than any max_new_tokens: decode until every row is done


class Engine:
    """Compiled programs of one model. Parameters of the same shapes can be swapped in."""

    def __init__(self, model: MiniGpt, mesh: Mesh | None = None):
        """mesh: the mesh that the parameters lie on; None for one device."""
        self.config = model.config
        self._graphdef, state = nnx.split(model)
        self._leaves, self._treedef = jax.tree.flatten(state)

        def compiled(program: Callable[..., Any], **options: Any) -> Any:
            """program(model, ...) as a compiled function of (leaves, ...)."""

            @wraps(program)
            def of_leaves(leaves: list[jax.Array], *args: Any) -> Any:
                return program(self._model(leaves), *args)

            return jax.jit(with_mesh(of_leaves, mesh), **options)

        self._prefill = compiled(programs.prefill, static_argnums=(2, 3, 4))
        self._resume = compiled(programs.resume, static_argnums=(4, 5), donate_argnums=(1,))
        self._decode = compiled(programs.decode, static_argnums=(3,), donate_argnums=(1,))
        self._search = compiled(programs.search, static_argnums=(4, 5, 6))
        self._grow_cache = jax.jit(with_mesh(grow_cache, mesh), static_argnums=(1,))
        self._insert = jax.jit(with_mesh(insert, mesh), donate_argnums=(0,))
        self._finish_rows = jax.jit(with_mesh(finish_rows, mesh), donate_argnums=(0,))
        self._snapshot = jax.jit(with_mesh(take_snapshot, mesh))

    def _model(self, leaves: list[jax.Array]) -> MiniGpt:
        model: MiniGpt = nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))
        return model

    @property
    def vocab(self) -> int:
        """V: the size of the vocabulary."""
        return self.config.llm.vocab

    def set_parameters(self, model: MiniGpt) -> None:
        """Use the parameters of another model of the same structure; nothing is compiled again."""
        self._leaves = jax.tree.leaves(nnx.state(model))

    # --- requests ---------------------------------------------------------------------------

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
            completions[plain[progress.request_index]] = [progress.completion]
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
        prefix_cache: for a single request: its prompt is processed from where it first differs from
        the cached one, and its own cache is stored there, also if the iterator is closed early.
        """
        if sized_for is None:
            sized_for = requests = list(requests)
        batch = RunningBatch(self, requests, sized_for, batch_size, prefix_cache)
        in_chunks = progress or any(request.stop_check for request in sized_for)
        return batch.run(chunk, always_in_chunks=in_chunks, progress=progress)

    def search(
        self, requests: Sequence[Request], batch_size: int = BATCH_SIZE
    ) -> list[list[Completion]]:
        """The best `num_return_sequences` completions of each request by beam search, best first.

        batch_size: beams at a time, of all requests together.
        """
        # Requests with equally many beams share a program.
        order = sorted(
            range(len(requests)),
            key=lambda i: (requests[i].beam_search.num_beams, len(requests[i].tokens)),
        )
        completions: list[list[Completion]] = [[] for _ in requests]
        while order:
            num_beams = requests[order[0]].beam_search.num_beams
            same = [i for i in order if requests[i].beam_search.num_beams == num_beams]
            batch = same[: max(1, batch_size // num_beams)]
            order = order[len(batch) :]
            best, nonfinite = self._search_batch([requests[i] for i in batch])
            for row, i in enumerate(batch):
                num_answers = requests[i].beam_search.num_return_sequences
                completions[i] = _completions(best, row, bool(nonfinite[row]))[:num_answers]
        return completions

    def _search_batch(self, requests: Sequence[Request]) -> tuple[Hypotheses, np.ndarray]:
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
        stages = required_stages([request.sampling for request in requests], self.vocab)
        max_new_tokens = bucket(int(inputs.max_new_tokens.max()), 16)
        best, nonfinite = self._search(
            self._leaves, inputs.tokens, inputs.visual, search_inputs, configs[0].num_beams,
            max_new_tokens, stages,
        )  # fmt: skip
        return Hypotheses(*map(np.asarray, best)), np.asarray(nonfinite)

    # --- the operations of a running batch ------------------------------------------------------

    def prefill(
        self,
        requests: Sequence[Request],
        sizes: BucketSizes | None = None,
        stages: SamplingStages | None = None,
    ) -> DecodeState:
        """Process the prompts and choose each row's first token."""
        sizes = sizes or bucket_sizes(requests)
        stages = stages or required_stages([request.sampling for request in requests], self.vocab)
        return self.prefill_inputs(self.batch_inputs(requests, sizes), sizes, stages)

    def prefill_inputs(
        self, inputs: BatchInputs, sizes: BucketSizes, stages: SamplingStages
    ) -> DecodeState:
        """As `prefill`, of arrays."""
        state: DecodeState = self._prefill(
            self._leaves, inputs, sizes.cache_length, sizes.max_new_tokens, stages
        )
        return state

    def resume(
        self,
        prefix_cache: PrefixCache,
        request: Request,
        sizes: BucketSizes,
        stages: SamplingStages,
    ) -> DecodeState:
        """As `prefill` of one request, processing only what the prefix cache does not hold."""
        cached = prefix_cache.take(request, self._leaves)
        if cached is None:
            return self.prefill([request], sizes, stages)
        length, cache = cached
        tokens, visual = suffix(request, length)
        inputs = self.batch_inputs([replace(request, tokens=tokens, visual=visual)], sizes)
        cache_length = max(sizes.cache_length, bucket(length + inputs.tokens.shape[1]))
        if cache_length > cache.length:
            cache = self._grow_cache(cache, cache_length)
        return self.extend(cache, inputs, length, sizes.max_new_tokens, stages)

    def extend(
        self,
        cache: KVCache,
        inputs: BatchInputs,
        length: int,
        max_new_tokens: int,
        stages: SamplingStages,
    ) -> DecodeState:
        """As `prefill` of rows whose first `length` positions are in `cache`, which is donated.

        inputs: what follows these positions. max_new_tokens: N of the bucket.
        """
        state: DecodeState = self._resume(
            self._leaves, cache, inputs, length, max_new_tokens, stages
        )
        return state

    def decode(
        self, state: DecodeState, stages: SamplingStages, steps: int = UNLIMITED_STEPS
    ) -> DecodeState:
        """Up to `steps` more tokens for every row that is not done. `state` is donated."""
        state = self._decode(self._leaves, state, steps, stages)
        return state

    def insert(self, state: DecodeState, new: DecodeState, slot: int) -> DecodeState:
        """`state` with the row of `new`, which has one, in a slot. `state` is donated."""
        state = self._insert(state, new, slot)
        return state

    def finish_rows(self, state: DecodeState, rows: np.ndarray) -> DecodeState:
        """`state` with the rows [B] that are True done. `state` is donated."""
        state = self._finish_rows(state, rows)
        return state

    def snapshot(self, state: DecodeState) -> Snapshot:
        """A copy of what the host reads, which stays valid when `state` is donated."""
        snapshot: Snapshot = self._snapshot(state)
        return snapshot

    def store_prefix(self, prefix_cache: PrefixCache, request: Request, state: DecodeState) -> None:
        """Keep the cache of a request that ran alone."""
        prefix_cache.store(request, state, self._leaves)

    def batch_inputs(
        self, requests: Sequence[Request], sizes: BucketSizes | None = None
    ) -> BatchInputs:
        """The requests as padded arrays."""
        sizes = sizes or bucket_sizes(requests)
        b = next_power_of_two(len(requests))
        padding = Request(tokens=[0], max_new_tokens=0)
        rows = [*requests, *[padding] * (b - len(requests))]
        lengths = np.array([len(row.tokens) for row in rows], np.int32)
        tokens = np.zeros((b, bucket(int(lengths.max()))), np.int32)
        for target, row in zip(tokens, rows, strict=True):
            target[: len(row.tokens)] = row.tokens
        seeds = jnp.asarray([row.seed % (1 << 32) for row in rows], jnp.uint32)
        return BatchInputs(
            tokens, lengths, stack_visual((row.visual for row in rows), self.config.llm.width),
            np.array([row.max_new_tokens for row in rows], np.int32),
            stack_stop_sequences(
                [row.stop_sequences for row in rows], sizes.num_stops, sizes.stop_width
            ),
            jax.vmap(partial(jax.random.key, impl=PRNG))(seeds),
            stack_sampling_params([row.sampling for row in rows]),
        )  # fmt: skip


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
