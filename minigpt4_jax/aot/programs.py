"""Lower the programs of training and inference from shapes alone, for devices that need not exist.

They are the programs that really run, `train_step.make_step` and those of `inference.engine.Engine`,
with `jax.ShapeDtypeStruct`s that carry shardings instead of arrays.
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from minigpt4_jax.aot.chip import Chip
from minigpt4_jax.aot.topology import CHIPS
from minigpt4_jax.checkpoint.loader import parameter_dtype
from minigpt4_jax.checkpoint.parameters import abstract_model, part_of
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.inference.decode_state import PRNG, BatchInputs, DecodeState
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.image_encoder import encode_pixels
from minigpt4_jax.inference.sampling import SamplingParams, required_stages
from minigpt4_jax.models.kv_cache import cache_axes
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.parallel.sharding import (
    BATCH_AXES,
    divisible_axes,
    parameter_sharding,
    replicated,
    with_mesh,
)
from minigpt4_jax.quantization.schemes import holds_levels
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.memory_estimate import BatchShape
from minigpt4_jax.training.optimizer import make_optimizer
from minigpt4_jax.training.train_step import (
    Split,
    is_trained,
    make_step,
    parts_with_dropout,
    split_model,
    trained_parts,
)
from minigpt4_jax.utils import platform

# Any, as shapes stand in for arrays; JAX does not annotate the constructors.
ShapeDtypeStruct: Any = jax.ShapeDtypeStruct
P: Any = PartitionSpec

BF16 = jnp.dtype(jnp.bfloat16)
MAX_NEW_TOKENS = 256  # that the decoding state has buffers for
ANY_TPU = CHIPS["v5e"]  # programs are traced alike for all TPUs


def _compiling_for(chip: Chip) -> contextlib.AbstractContextManager[None]:
    return platform.compiling_for(chip.platform, chip.compute_capability)


def sharded_shape(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> Any:
    return ShapeDtypeStruct(shape, dtype, sharding=sharding)


def replicate_shapes(tree: Any, mesh: Mesh) -> Any:
    """The shapes of a tree, fully replicated."""
    return jax.tree.map(lambda a: sharded_shape(a.shape, a.dtype, replicated(mesh)), tree)


def batch_shape(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    """The shape of a batch array, its rows sharded as `sharding.shard_batch` does."""
    spec = P(*divisible_axes(shape[:1], (BATCH_AXES,), mesh.shape))
    return sharded_shape(shape, dtype, NamedSharding(mesh, spec))


def parameter_specs(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], jnp.dtype]]:
    """(name, shape, dtype) of the parameters for inference in bfloat16."""
    state = nnx.state(abstract_model(config, stacked=False))
    for path, leaf in nnx.to_flat_state(state):
        yield ".".join(map(str, path)), leaf.shape, _dtype(path, leaf, BF16)


def _dtype(path: tuple[Any, ...], leaf: Any, dtype: jnp.dtype) -> jnp.dtype:
    """Quantized weights keep their type."""
    levels = holds_levels(leaf.dtype)
    return jnp.dtype(leaf.dtype) if levels else parameter_dtype(path, dtype)


def model_shapes(
    config: ModelConfig, mesh: Mesh, *, stacked: bool, trainable_parts: frozenset[str] = frozenset()
) -> Any:
    """The model with shapes as parameters, sharded as `load_model` in bfloat16 does.
    trainable_parts are in float32 and replicated."""
    graphdef, state = nnx.split(abstract_model(config, stacked=stacked))
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        if part_of(name) in trainable_parts:
            dtype, sharding = _dtype(path, leaf, jnp.dtype(jnp.float32)), replicated(mesh)
        else:
            dtype = _dtype(path, leaf, BF16)
            sharding = parameter_sharding(name, leaf.shape, leaf.dtype, config, mesh)
        leaves.append((path, leaf.replace(sharded_shape(leaf.shape, dtype, sharding))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


# --- training -----------------------------------------------------------------------------------


def split_shapes(config: ModelConfig, trained: frozenset[str], mesh: Mesh) -> Split:
    """`split_model` of the loaded model, with shapes."""
    stacked = not platform.unrolls_layers()
    shapes = model_shapes(config, mesh, stacked=stacked, trainable_parts=trained)
    graphdef, state = nnx.split(shapes)
    splits: list[Split] = []

    def split(state: Any) -> Any:
        splits.append(split_model(nnx.merge(graphdef, state), trained, BF16))
        return splits[0].trainable, splits[0].frozen

    trainable, frozen_shapes = jax.eval_shape(split, state)
    # eval_shape drops the shardings
    loaded = [
        leaf.get_value() for path, leaf in nnx.to_flat_state(state) if not is_trained(path, trained)
    ]
    if [a.shape[:-1] for a in loaded] != [a.shape[:-1] for a in frozen_shapes]:
        raise AssertionError("split_model orders the frozen arrays differently")
    frozen = tuple(
        sharded_shape(a.shape, a.dtype, of.sharding)  # the last axis may be padded
        for a, of in zip(frozen_shapes, loaded, strict=True)
    )
    return splits[0]._replace(trainable=replicate_shapes(trainable, mesh), frozen=frozen)


def lower_train_step(
    c: TrainConfig, config: ModelConfig, mesh: Mesh, shape: BatchShape, chip: Chip = ANY_TPU
) -> Any:
    """The lowered training step, with one image per row. chip: what it is traced for."""
    with _compiling_for(chip):
        return _lower_train_step(c, config, mesh, shape)


def _lower_train_step(c: TrainConfig, config: ModelConfig, mesh: Mesh, shape: BatchShape) -> Any:
    parts = trained_parts(freeze_vit=c.freeze_vit, freeze_qformer=c.freeze_qformer, config=config)
    split = split_shapes(config, parts, mesh)
    tx = make_optimizer(c, split.decay_mask)
    dropout_in = parts_with_dropout(config) & parts
    step: Any = make_step(
        split, tx, mesh, accumulate=c.accumulate, remat=c.remat,
        dropout_seed=c.seed if dropout_in else None, dropout_in=dropout_in,
    )  # fmt: skip
    b, edge = shape.rows, config.vision.image_size
    batch = Batch(
        batch_shape((b, 1, edge, edge, 3), jnp.uint8, mesh),
        batch_shape((b, shape.tokens), jnp.int32, mesh),
        batch_shape((b,), jnp.int32, mesh),
        batch_shape((b, shape.labels), jnp.int32, mesh),
    )
    opt_state = replicate_shapes(jax.eval_shape(tx.init, split.trainable), mesh)
    scalars = [sharded_shape((), dtype, replicated(mesh)) for dtype in (jnp.float32, jnp.int32)]
    return step.lower(split.trainable, opt_state, split.frozen, batch, *scalars)


# --- inference ----------------------------------------------------------------------------------


class AbstractEngine(Engine):
    """An inference engine with shapes as parameters: its programs can be lowered, not run. Greedy
    decoding. chip: what programs are traced for."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, *, kv_cache: str | None = None, chip: Chip = ANY_TPU
    ):
        self.mesh, self.chip = mesh, chip
        with _compiling_for(chip):
            self.model = model_shapes(config, mesh, stacked=False)
            if not config.is_stage1:
                self.model.llm.cache_kind = kv_cache
            super().__init__(self.model, mesh)
        self.plan = required_stages([SamplingParams()], config.llm.vocab)

    def lower_encode(self, images: int) -> Any:
        """The vision side for a number of images."""
        graphdef, state = nnx.split(self.model)
        edge = self.config.vision.image_size
        pixels = sharded_shape((images, edge, edge, 3), jnp.uint8, replicated(self.mesh))

        def encode(state: Any, pixels: jax.Array) -> jax.Array:
            return encode_pixels(nnx.merge(graphdef, state), pixels)

        with _compiling_for(self.chip):
            options = platform.compiler_options("products")
            return jax.jit(with_mesh(encode, self.mesh), compiler_options=options).lower(
                state, pixels
            )

    def lower_prefill(self, rows: int, tokens: int, context: int) -> Any:
        """Prefill of prompts of `tokens` tokens into a cache of `context`."""
        with _compiling_for(self.chip):
            return self._prefill.lower(
                self._leaves, self._request_shapes(rows, tokens), context, MAX_NEW_TOKENS, self.plan
            )

    def lower_decode(self, rows: int, context: int) -> Any:
        """The decoding loop over a cache of `context`; an iteration generates one token per row."""
        with _compiling_for(self.chip):
            requests = self._request_shapes(rows, min(32, context))
            state = self._prefill.eval_shape(
                self._leaves, requests, context, MAX_NEW_TOKENS, self.plan
            )
            limit = sharded_shape((), jnp.int32, replicated(self.mesh))
            shapes = self._shard_state(state)
            return self.decode_program(rows).lower(self._leaves, shapes, limit, limit, self.plan)

    def _request_shapes(self, rows: int, tokens: int) -> BatchInputs:
        c = self.config
        seeds = jnp.zeros(rows, jnp.uint32)
        keys = jax.eval_shape(lambda: jax.vmap(partial(jax.random.key, impl=PRNG))(seeds))
        integers = ShapeDtypeStruct((rows,), jnp.int32)
        floats = ShapeDtypeStruct((rows,), jnp.float32)
        shapes = BatchInputs(
            ShapeDtypeStruct((rows, tokens), jnp.int32), integers,
            ShapeDtypeStruct((rows, c.visual_tokens, c.visual_width), jnp.float32), integers,
            ShapeDtypeStruct((rows, 1, 2), jnp.int32), keys,
            SamplingParams(
                floats, integers, floats, floats, integers, floats, integers, floats, floats
            ),
        )  # fmt: skip
        requests: BatchInputs = replicate_shapes(shapes, self.mesh)
        return requests

    def _shard_state(self, state: DecodeState) -> DecodeState:
        """Shapes of a decoding state with the shardings that the engine's programs give it."""
        axes = cache_axes(state.cache)

        def shard(a: Any) -> Any:
            spec = P(*divisible_axes(a.shape[: len(axes)], axes, self.mesh.shape))
            return sharded_shape(a.shape, a.dtype, NamedSharding(self.mesh, spec))

        cache = jax.tree.map(shard, state.cache)
        without_cache: DecodeState = replicate_shapes(state._replace(cache=None), self.mesh)
        return without_cache._replace(cache=cache)
