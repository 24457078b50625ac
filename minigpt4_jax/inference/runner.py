"""The compiled programs of one model, and the operations of a running batch that use them.

Every row has its own length, limits, stop sequences, sampling parameters and PRNG key, all of them
arrays in `DecodeState`, so requests of any kind share a program. Sizes are rounded up to buckets,
so that few programs are compiled. The cache is donated, so that decoding does not copy it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.inference import programs
from minigpt4_jax.inference.decode_state import (
    PRNG,
    BatchInputs,
    DecodeState,
    Snapshot,
    finish_rows,
    insert,
    resize,
    take_cache_row,
    take_snapshot,
)
from minigpt4_jax.inference.requests import (
    BucketSizes,
    Request,
    bucket,
    bucket_sizes,
    fine_bucket,
    section,
)
from minigpt4_jax.inference.sampling import SamplingStages, required_stages, stack_sampling_params
from minigpt4_jax.inference.shared_programs import Program, shared_jit, shared_programs
from minigpt4_jax.inference.stop_sequences import stack_stop_sequences
from minigpt4_jax.inference.visual_tokens import stack_visual
from minigpt4_jax.models.kv_cache import KVCache, bytes_per_position, grow_cache
from minigpt4_jax.models.lora import lora_layers
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.utils.platform import backend
from minigpt4_jax.utils.rounding import next_power_of_two

UNLIMITED = (
    1 << 30
)  # more than any max_new_tokens or number of rows: decode until every row is done


class ModelRunner:
    """Compiled programs of one model. Parameters of the same shapes can be swapped in."""

    def __init__(self, model: MiniGpt, mesh: Mesh | None = None):
        """mesh: the mesh that the parameters lie on; None for one device."""
        self.config = model.config
        graphdef, state = nnx.split(model)
        self._leaves, treedef = jax.tree.flatten(state)
        self._weight_slots = _weight_slots(model)

        compiled = shared_programs(graphdef, mesh, treedef)
        reads = _read_options(model, mesh)
        self._prefill = compiled(programs.prefill, static_argnums=(2, 3, 4))
        self._resume = compiled(programs.resume, static_argnums=(4, 5), donate_argnums=(1,))
        decode = partial(compiled, programs.decode, static_argnums=(4,), donate_argnums=(1,))
        self._decode = self._decode_row = decode(bound=reads)
        if backend() == "gpu" and reads in ("separate reads", "unsplit reads"):
            self._decode_row = decode(bound="reads")  # joined products of one row copy no weights
        self._search = compiled(programs.search, reads, static_argnums=(4, 5, 6))
        self._grow_cache = shared_jit(grow_cache, mesh, static_argnums=(1,))
        self._insert = shared_jit(insert, mesh, donate_argnums=(0,))
        self._resize = shared_jit(resize, mesh, static_argnums=(2,))
        self._take_cache_row = shared_jit(take_cache_row, mesh, static_argnums=(2,))
        self._finish_rows = shared_jit(finish_rows, mesh, donate_argnums=(0,))
        self._snapshot = shared_jit(take_snapshot, mesh)

    def with_programs(self, wrap: Callable[[Program], Program]) -> Self:
        """A copy that runs `wrap` of each program instead of it."""
        wrapped = copy(self)
        for name in (
            "_prefill", "_resume", "_decode", "_decode_row", "_search", "_grow_cache", "_insert",
            "_resize", "_take_cache_row", "_finish_rows", "_snapshot",
        ):  # fmt: skip
            setattr(wrapped, name, wrap(getattr(self, name)))
        return wrapped

    @property
    def precision(self) -> str:
        """The number format of most of the parameters, such as "bfloat16" or "int8"."""
        sizes: Counter[str] = Counter()
        for leaf in self._leaves:
            sizes[leaf.dtype.name] += leaf.size
        name = sizes.most_common(1)[0][0]
        return {"uint8": "int4"}.get(name, name)  # two levels in a byte

    def bucket_sizes(self, requests: Sequence[Request], rows: int | None = None) -> BucketSizes:
        """The sizes for some requests, in arrays of `rows` rows; see `cache_length`."""
        rows = next_power_of_two(rows or len(requests))
        return bucket_sizes(requests, partial(self.cache_length, rows=rows))

    def cache_length(self, tokens: int, rows: int) -> int:
        """Cache slots S for rows of this many tokens. On a GPU the buckets are finer where unused slots
        would take a noticeable part of a decoding step: for many rows, and for small weights."""
        if backend() != "gpu" or not self._weight_slots:
            return bucket(tokens)
        return fine_bucket(tokens, self._weight_slots / rows)

    @property
    def vocab(self) -> int:
        """V: the size of the vocabulary."""
        return self.config.llm.vocab

    @property
    def leaves(self) -> list[jax.Array]:
        """The parameters; another list after `set_parameters`."""
        return self._leaves

    def set_parameters(self, model: MiniGpt) -> None:
        """Use the parameters of another model of the same structure; nothing is compiled again."""
        self._leaves = jax.tree.leaves(nnx.state(model))

    def prefill(
        self,
        requests: Sequence[Request],
        sizes: BucketSizes | None = None,
        stages: SamplingStages | None = None,
        prompt_size: int | None = None,
    ) -> DecodeState:
        """Process the prompts and choose each row's first token. prompt_size: see `batch_inputs`."""
        sizes = sizes or self.bucket_sizes(requests)
        stages = stages or self.stages(requests)
        inputs = self.batch_inputs(requests, sizes, prompt_size)
        return self.prefill_inputs(inputs, sizes, stages)

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
        cache: KVCache,
        length: int,
        request: Request,
        sizes: BucketSizes | None = None,
        stages: SamplingStages | None = None,
        prompt_size: int | None = None,
    ) -> DecodeState:
        """As `prefill` of one request whose first `length` tokens are in a cache, which is donated."""
        sizes, stages = sizes or self.bucket_sizes([request]), stages or self.stages([request])
        inputs = self.batch_inputs([section(request, length)], sizes, prompt_size)
        cache_length = sizes.cache_length
        if prompt_size is None:
            needed = self.cache_length(length + inputs.tokens.shape[1], 1)
            cache_length = max(cache_length, needed)
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

    def decode_program(self, rows: int) -> Any:
        """The compiled function of (leaves, state, steps, max_ended, stages) that decodes so many rows."""
        return self._decode_row if rows == 1 else self._decode

    def decode(
        self,
        state: DecodeState,
        stages: SamplingStages,
        steps: int = UNLIMITED,
        max_ended: int = UNLIMITED,
    ) -> DecodeState:
        """Up to `steps` more tokens for every row that is not done, until `max_ended` more rows are done.

        `state` is donated.
        """
        program = self.decode_program(state.ids.shape[0])
        state = program(self._leaves, state, steps, max_ended, stages)
        return state

    def insert(self, state: DecodeState, new: DecodeState, slot: int) -> DecodeState:
        """`state` with the row of `new`, which has one, in a slot. `state` is donated."""
        state = self._insert(state, new, slot)
        return state

    def resize(
        self, state: DecodeState, rows: Sequence[int | None], sizes: BucketSizes
    ) -> DecodeState:
        """These rows of a state as a batch of other sizes; None is an empty row."""
        index = np.array([-1 if row is None else row for row in rows], np.int32)
        state = self._resize(state, index, sizes)
        return state

    def finish_rows(self, state: DecodeState, rows: np.ndarray) -> DecodeState:
        """`state` with the rows [B] that are True done. `state` is donated."""
        state = self._finish_rows(state, rows)
        return state

    def snapshot(self, state: DecodeState) -> Snapshot:
        """A copy of what the host reads, which stays valid when `state` is donated."""
        snapshot: Snapshot = self._snapshot(state)
        return snapshot

    def take_cache_row(self, cache: KVCache, row: int, length: int) -> KVCache:
        """A copy of the first `length` slots of a row of a cache, with zeros where that is shorter."""
        taken: KVCache = self._take_cache_row(cache, row, length)
        return taken

    def stages(self, requests: Sequence[Request]) -> SamplingStages:
        """The sampling stages that these requests need."""
        return required_stages([request.sampling for request in requests], self.vocab)

    def batch_inputs(
        self,
        requests: Sequence[Request],
        sizes: BucketSizes | None = None,
        prompt_size: int | None = None,
    ) -> BatchInputs:
        """The requests as padded arrays.

        prompt_size: pads tokens and visual tokens to T, so that the number of images changes no shape.
        """
        sizes = sizes or self.bucket_sizes(requests)
        b = next_power_of_two(len(requests))
        padding = Request(tokens=[0], max_new_tokens=0)
        rows = [*requests, *[padding] * (b - len(requests))]
        lengths = np.array([len(row.tokens) for row in rows], np.int32)
        tokens = np.zeros((b, prompt_size or bucket(int(lengths.max()))), np.int32)
        for target, row in zip(tokens, rows, strict=True):
            target[: len(row.tokens)] = row.tokens
        seeds = np.array([row.seed % (1 << 32) for row in rows], np.uint32)
        return BatchInputs(
            tokens, lengths,
            stack_visual(
                [row.visual for row in rows], self.config.visual_tokens, self.config.visual_width,
                prompt_size,
            ),
            np.array([row.max_new_tokens for row in rows], np.int32),
            stack_stop_sequences(
                [row.stop_sequences for row in rows], sizes.num_stops, sizes.stop_width
            ),
            _keys(seeds),
            stack_sampling_params([row.sampling for row in rows]),
        )  # fmt: skip


@jax.jit
def _keys(seeds: jax.Array) -> jax.Array:
    """PRNG keys [B] of seeds [B] uint32."""
    return jax.vmap(partial(jax.random.key, impl=PRNG))(seeds)


def _read_options(model: MiniGpt, mesh: Mesh | None) -> str:
    """What bounds a model's decoding, as `compiler_options` names it."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))}
    if jnp.dtype(jnp.uint8) in dtypes:
        return "packed reads"
    splits = 1 if mesh is None else mesh.shape.get("model", 1)
    if splits > 1 and jnp.dtype(jnp.int8) in dtypes and model.config.llm.ffn // splits % 64:
        return "unsplit reads"
    has_adapters = any(not layer.merged for layer in lora_layers(model))
    return "separate reads" if splits > 1 or has_adapters else "reads"


def _weight_slots(model: MiniGpt) -> float:
    """Bytes of the weights that decoding reads, over those of a cache slot; 0 without a language model."""
    if model.config.is_stage1:
        return 0.0
    llm = model.llm
    unused = {"encoder_blocks"} if model.config.llm.tie else {"encoder_blocks", "embed"}
    arrays = [
        leaf.get_value()
        for path, leaf in nnx.to_flat_state(nnx.state(llm))
        if path[0] not in unused
    ]
    itemsize = (
        (llm.embed if llm.embed_scale is None else llm.embed_scale).get_value().dtype.itemsize
    )
    slot = bytes_per_position(model.config.llm, llm.cache_kind, itemsize)
    return float(sum(a.size * a.dtype.itemsize for a in arrays)) / slot
