"""The generation engine: prefill a request, insert it into a slot of the running batch, step all slots.

Every row has its own length, limit, stop rules, options and random stream, all of them arrays in
`State` (slots.py), so requests of any kind share a program. Shapes are rounded up to buckets, so that few
programs are compiled; the cache is donated, so that decoding does not copy it. The next chunk of
steps is on its way before the host looks at what the last one made.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minigpt4_jax.inference.beam_search import Hypotheses, Rules, search
from minigpt4_jax.inference.decode_state import (
    PRNG,
    Rows,
    State,
    advance,
    cut,
    end,
    insert,
    placed,
    read,
    report,
)
from minigpt4_jax.inference.prefix_cache import PrefixCache, behind
from minigpt4_jax.inference.requests import (
    Completion,
    Request,
    Shapes,
    bucket,
    shapes_of,
    stack_visual,
)
from minigpt4_jax.inference.sampling import SamplingStages, stack_options, stages_of
from minigpt4_jax.inference.stop_sequences import stack_stops
from minigpt4_jax.models.kv_cache import KVCache, grow_cache
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.parallel.sharding import constrain, mesh_of, with_mesh
from minigpt4_jax.utils.rounding import next_power_of_two

BATCH_SIZE = 32  # rows decoded together
CHUNK = 16  # steps between two looks of the host, where it has something to decide
STEPS = 1 << 30  # more than any limit: the loop runs until every row is done


class Engine:
    """Compiled programs of one model, whose parameters others of the same shapes can replace."""

    def __init__(self, model: MiniGpt):
        self.config = model.config
        self._graphdef, self._treedef = _structure(model)
        self._leaves = jax.tree.leaves(nnx.state(model))
        on = partial(with_mesh, mesh=mesh_of(self._leaves))
        self._start = jax.jit(on(self._start_program), static_argnums=(2, 3, 4))
        self._grow = jax.jit(on(grow_cache), static_argnums=(1,))
        self._resume = jax.jit(on(self._resume_program), static_argnums=(4, 5), donate_argnums=(1,))
        self._decode = jax.jit(on(self._decode_program), static_argnums=(3,), donate_argnums=(1,))
        self._insert = jax.jit(on(insert), donate_argnums=(0,))
        self._end = jax.jit(on(end), donate_argnums=(0,))
        self._report = jax.jit(on(report))
        self._search = jax.jit(on(self._search_program), static_argnums=(4, 5, 6))

    def set_parameters(self, model: MiniGpt) -> None:
        """Use the parameters of another model of the same structure; compiled programs stay."""
        self._leaves = jax.tree.leaves(nnx.state(model))

    def generate(
        self, requests: Sequence[Request], batch_size: int = BATCH_SIZE
    ) -> list[list[int]]:
        """New ids of each request, in order; a stop sequence that ended a row is its last ids."""
        return [answers[0].ids for answers in self.answer(requests, batch_size)]

    def answer(
        self,
        requests: Sequence[Request],
        batch_size: int = BATCH_SIZE,
        kept: PrefixCache | None = None,
    ) -> list[list[Completion]]:
        """The answers to each request, in order: one, or `beams.returned` of beam search.

        kept: as of `run`; a search leaves it as it is.
        """
        found: list[list[Completion]] = [[] for _ in requests]
        plain = [i for i, r in enumerate(requests) if r.beams.count == 1]
        for i, answer, _ in self.run([requests[i] for i in plain], batch_size, kept=kept):
            found[plain[i]] = [answer]
        beams = [i for i, r in enumerate(requests) if r.beams.count > 1]
        for i, answers in zip(
            beams, self.search([requests[i] for i in beams], batch_size), strict=True
        ):
            found[i] = answers
        return found

    def run(
        self,
        requests: Iterable[Request],
        batch_size: int = BATCH_SIZE,
        chunk: int = CHUNK,
        progress: bool = False,
        like: Sequence[Request] | None = None,
        kept: PrefixCache | None = None,
    ) -> Iterator[tuple[int, Completion, bool]]:
        """(index of a request, its answer, whether that is all of it) as requests finish.

        The slot of a finished row is refilled. progress: also yields what rows that go on have so
        far, after every `chunk` of steps. like: with it, requests may be any iterable, each of them
        taken when a slot is free, and no larger and of no other options than one of `like`. kept:
        for a single request, which goes on from what is there, as far as it begins alike, and
        leaves its own cache there, also when the iterator is closed before the end.
        """
        if like is None:
            like = requests = list(requests)
        waiting = enumerate(requests)
        running = dict(islice(waiting, batch_size))
        if not running:
            return
        plan = stages_of([r.options for r in like], self.vocab)
        shapes = shapes_of(like)
        slots = list(running)
        begin = self.prefill if kept is None else partial(self._go_on, kept)
        state = begin(list(running.values()), shapes, plan)
        watched = progress or any(r.halt for r in like)
        reports: deque[tuple[list[int], Any]] = deque()
        following = next(waiting, None)  # known early: to see whether there is one
        try:
            while running:
                state = self.decode(state, plan, chunk if watched or following else STEPS)
                reports.append((list(slots), self._report(state)))
                if len(reports) < 2:  # the device always has a chunk to work on
                    continue
                halted = np.zeros(state.done.shape[0], bool)
                owners, made = reports.popleft()
                for slot, i, answer, done in read(owners, made):
                    if slots[slot] != i:
                        continue  # answered or halted before this chunk began
                    halt = running[i].halt
                    keep = halt(answer.ids) if halt else None
                    if keep is not None:
                        answer = cut(answer, keep)
                        halted[slot] = not done
                    over = done or keep is not None
                    if over:
                        slots[slot] = -1
                        del running[i]
                    if over or progress:
                        yield i, answer, over
                if halted.any():
                    state = self._end(state, halted)
                for slot in [s for s, i in enumerate(slots) if i < 0]:
                    if following:
                        slots[slot], request = following
                        running[slots[slot]] = request
                        state = self._insert(state, self.prefill([request], shapes, plan), slot)
                        following = next(waiting, None)
        finally:
            if kept is not None:
                kept.keep(like[0], state, self._leaves)

    def search(
        self, requests: Sequence[Request], batch_size: int = BATCH_SIZE
    ) -> list[list[Completion]]:
        """The best `beams.returned` answers of each request by beam search, the best first.

        batch_size: beams at a time, of all the requests together.
        """
        # those of as many beams share a program
        order = sorted(
            range(len(requests)), key=lambda i: (requests[i].beams.count, len(requests[i].tokens))
        )
        found: list[list[Completion]] = [[] for _ in requests]
        while order:
            count = requests[order[0]].beams.count
            some = [i for i in order if requests[i].beams.count == count]
            some = some[: max(1, batch_size // count)]
            order = order[len(some) :]
            best = self._search_batch([requests[i] for i in some])
            for row, i in enumerate(some):
                found[i] = _answers(best, row)[: requests[i].beams.returned]
        return found

    def _search_batch(self, requests: Sequence[Request]) -> Hypotheses:
        rows = self._rows(requests)
        beams = [r.beams for r in requests]
        padding = [beams[0]] * (len(rows.lengths) - len(beams))
        rules = Rules(
            rows.lengths, rows.limit, rows.stops, rows.options,
            np.array([b.length_penalty for b in beams + padding], np.float32),
            np.array([b.early_stopping for b in beams + padding]),
        )  # fmt: skip
        plan = stages_of([r.options for r in requests], self.vocab)
        room = bucket(int(rows.limit.max()), 16)
        found = self._search(
            self._leaves, rows.tokens, rows.visual, rules, beams[0].count, room, plan
        )
        return jax.tree.map(np.asarray, found)

    @property
    def vocab(self) -> int:
        return self.config.llm.vocab

    def prefill(
        self,
        requests: Sequence[Request],
        shapes: Shapes | None = None,
        plan: SamplingStages | None = None,
    ) -> State:
        """Read the prompts and choose each row's first token."""
        shapes = shapes or shapes_of(requests)
        rows = self._rows(requests, shapes)
        plan = plan or stages_of([r.options for r in requests], self.vocab)
        return self._start(self._leaves, rows, shapes.cache, shapes.room, plan)

    def _go_on(
        self, kept: PrefixCache, requests: Sequence[Request], shapes: Shapes, plan: SamplingStages
    ) -> State:
        """As `prefill` of one request, reading only what `kept` has not read."""
        (request,) = requests
        found = kept.take(request, self._leaves)
        if found is None:
            return self.prefill(requests, shapes, plan)
        n, cache = found
        tokens, visual = behind(request, n)
        rows = self._rows([replace(request, tokens=tokens, visual=visual)], shapes)
        length = max(shapes.cache, bucket(n + rows.tokens.shape[1]))
        if length > cache.length:
            cache = self._grow(cache, length)
        return self._resume(self._leaves, cache, rows, n, shapes.room, plan)

    def decode(self, state: State, plan: SamplingStages, steps: int = STEPS) -> State:
        """Up to `steps` more tokens for every row that is not done. `state` is given up."""
        return self._decode(self._leaves, state, steps, plan)

    def _rows(self, requests: Sequence[Request], shapes: Shapes | None = None) -> Rows:
        shapes = shapes or shapes_of(requests)
        b = next_power_of_two(len(requests))
        none = Request(tokens=[0], max_new_tokens=0)
        padded = [*requests, *[none] * (b - len(requests))]
        lengths = np.array([len(r.tokens) for r in padded], np.int32)
        tokens = np.zeros((b, bucket(int(lengths.max()))), np.int32)
        for row, r in zip(tokens, padded, strict=True):
            row[: len(r.tokens)] = r.tokens
        seeds = jnp.asarray([r.seed % (1 << 32) for r in padded], jnp.uint32)
        return Rows(
            tokens, lengths, stack_visual([r.visual for r in padded], self.config.llm.width),
            np.array([r.max_new_tokens for r in padded], np.int32),
            stack_stops([r.stops for r in padded], shapes.stops, shapes.width),
            jax.vmap(partial(jax.random.key, impl=PRNG))(seeds),
            stack_options([r.options for r in padded]),
        )  # fmt: skip

    # --- the compiled programs --------------------------------------------------------------

    def _model(self, leaves: list[jax.Array]) -> MiniGpt:
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _start_program(
        self,
        leaves: list[jax.Array],
        rows: Rows,
        cache_length: int,
        room: int,
        plan: SamplingStages,
    ) -> State:
        model = self._model(leaves)
        embeds = model.merge(rows.tokens, rows.visual)
        hidden, cache = model.llm.prefill(embeds, rows.lengths, cache_length)
        return self._first(model, hidden, cache, rows, rows.lengths, room, plan)

    def _resume_program(
        self, leaves: list[jax.Array], cache: KVCache, rows: Rows, n: jax.Array, room: int,
        plan: SamplingStages,
    ) -> State:  # fmt: skip
        """rows: what follows the first n positions, which the cache holds."""
        model = self._model(leaves)
        embeds = model.merge(rows.tokens, rows.visual)
        positions = jnp.broadcast_to(n + jnp.arange(embeds.shape[1]), rows.tokens.shape)
        hidden, cache = model.llm.decode(embeds, positions, cache)
        return self._first(model, hidden, cache, rows, n + rows.lengths, room, plan)

    def _first(
        self, model: MiniGpt, hidden: jax.Array, cache: KVCache, rows: Rows, lengths: jax.Array,
        room: int, plan: SamplingStages,
    ) -> State:  # fmt: skip
        """The first token of every row, from hidden [B, T, D]; lengths [B]: of the whole prompts."""
        last = jnp.take_along_axis(hidden, rows.lengths[:, None, None] - 1, axis=1)[:, 0]
        b = rows.lengths.shape[0]
        state = State(
            cache,
            token=jnp.zeros(b, jnp.int32),
            position=lengths - 1,
            ids=jnp.full((b, room), -1, jnp.int32),
            logprobs=jnp.zeros((b, room), jnp.float32),
            made=jnp.zeros(b, jnp.int32),
            done=rows.limit <= 0,
            stopped=jnp.zeros(b, bool),
            limit=rows.limit,
            stops=rows.stops,
            keys=rows.keys,
            options=rows.options,
        )
        return placed(advance(state, model.llm.logits(last), plan))

    def _search_program(self, leaves: list[jax.Array], *args: Any) -> Hypotheses:
        return jax.tree.map(constrain, search(self._model(leaves), *args))

    def _decode_program(
        self, leaves: list[jax.Array], state: State, steps: jax.Array, plan: SamplingStages
    ) -> State:
        model = self._model(leaves)

        def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            i, s = carry
            embeds = model.llm.embed_tokens(s.token[:, None])
            hidden, cache = model.llm.decode(embeds, s.position[:, None], s.cache)
            return i + 1, advance(s._replace(cache=cache), model.llm.logits(hidden[:, 0]), plan)

        def wanted(carry: tuple[jax.Array, State]) -> jax.Array:
            return (carry[0] < steps) & ~jnp.all(carry[1].done)

        return placed(jax.lax.while_loop(wanted, step, (jnp.int32(0), state))[1])


def _answers(best: Hypotheses, row: int) -> list[Completion]:
    """The hypotheses of one row."""
    entries = zip(*(a[row] for a in best), strict=True)
    return [
        Completion(ids[:made].tolist(), logprobs[:made].tolist(), bool(ended), float(score))
        for ids, logprobs, made, score, ended in entries
    ]


def _structure(model: MiniGpt) -> tuple[Any, Any]:
    graphdef, state = nnx.split(model)
    return graphdef, jax.tree.structure(state)
