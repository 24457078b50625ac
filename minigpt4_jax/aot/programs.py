"""The programs of training and answering, compiled for a slice from shapes alone.

They are the ones that run: `training.step.make_step` and the programs of `generate.Engine`, given
shapes that say where they would lie.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax.checkpoint import weights
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.inference.engine import PRNG, Engine, Rows, State
from minigpt4_jax.inference.sampling import SamplingParams, stages_of
from minigpt4_jax.models.kv_cache import cache_axes
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.parallel.sharding import (
    BATCH_AXES,
    constrain,
    fitting,
    on_mesh,
    parameter_sharding,
    replicated,
)
from minigpt4_jax.training import optimizer
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.memory_estimate import Shape
from minigpt4_jax.training.train_step import (
    Split,
    is_trained,
    make_step,
    split_model,
    trained_parts,
)
from minigpt4_jax.utils import platform

BF16 = jnp.dtype(jnp.bfloat16)


def shape_of(shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def lies_whole(tree: Any, mesh: Mesh) -> Any:
    """Shapes of a tree, whole on every chip."""
    return jax.tree.map(lambda a: shape_of(a.shape, a.dtype, replicated(mesh)), tree)


def by_rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> Any:
    """The shape of an array whose rows are split over the chips, as `sharding.put_rows` puts it."""
    where = NamedSharding(mesh, P(*fitting(shape[:1], (BATCH_AXES,), mesh.shape)))
    return shape_of(shape, dtype, where)


def parameters(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], jnp.dtype]]:
    """(name, shape, type) of the model's parameters for answering in bfloat16."""
    state = nnx.state(weights.abstract_model(config, stacked=False))
    for path, leaf in nnx.to_flat_state(state):
        yield ".".join(map(str, path)), leaf.shape, _kind(path, leaf, BF16)


def _kind(path: tuple, leaf: Any, dtype: jnp.dtype) -> jnp.dtype:
    integer = jnp.issubdtype(leaf.dtype, jnp.integer)
    return jnp.dtype(leaf.dtype) if integer else weights.parameter_dtype(path, dtype)


def model_shapes(config: ModelConfig, mesh: Mesh, *, stacked: bool, masters: Any = ()) -> Any:
    """The model as `weights.load_model` in bfloat16 puts it on a mesh, of shapes."""
    graphdef, state = nnx.split(weights.abstract_model(config, stacked=stacked))
    filled = []
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        exact = weights.part_of(name) in masters
        kind = _kind(path, leaf, jnp.dtype(jnp.float32) if exact else BF16)
        where = replicated(mesh) if exact else parameter_sharding(
            name, leaf.shape, leaf.dtype, config, mesh
        )  # fmt: skip
        filled.append((path, leaf.replace(shape_of(leaf.shape, kind, where))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


# --- training -----------------------------------------------------------------------------------


def split_shapes(config: ModelConfig, parts: frozenset[str], mesh: Mesh) -> Split:
    """As `split_model` of the loaded model, of shapes."""
    graphdef, state = nnx.split(model_shapes(config, mesh, stacked=True, masters=parts))
    kept: list[Split] = []

    def take_apart(state: Any) -> Any:
        kept.append(split_model(nnx.merge(graphdef, state), parts, BF16))
        return kept[0].trainable, kept[0].frozen

    trainable, shapes = jax.eval_shape(take_apart, state)
    frozen = tuple(
        leaf.get_value() for path, leaf in nnx.to_flat_state(state) if not is_trained(path, parts)
    )
    if [a.shape for a in frozen] != [a.shape for a in shapes]:
        raise AssertionError("split_model orders the frozen arrays in another way")
    return kept[0]._replace(trainable=lies_whole(trainable, mesh), frozen=frozen)


def train_step(c: TrainConfig, config: ModelConfig, mesh: Mesh, shape: Shape) -> Any:
    """The lowered step of a run: a row has one image."""
    parts = trained_parts(freeze_vit=c.freeze_vit, freeze_qformer=c.freeze_qformer)
    split = split_shapes(config, parts, mesh)
    tx = optimizer.adamw(
        split.decays, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, clip=c.clip
    )
    lora = config.lora is not None and config.lora.dropout > 0
    qformer = "qformer" in parts and config.qformer is not None and config.qformer.dropout > 0
    dropout_in = {"lora": lora, "qformer": qformer}
    step: Any = make_step(
        split, tx, accumulate=c.accumulate, remat=c.remat,
        dropout_seed=c.seed if any(dropout_in.values()) else None,
        dropout_in=[part for part, on in dropout_in.items() if on],
    )  # fmt: skip
    b, edge = shape.rows, config.vision.image_size
    batch = Batch(
        by_rows((b, 1, edge, edge, 3), jnp.uint8, mesh), by_rows((b, shape.tokens), jnp.int32, mesh),
        by_rows((b,), jnp.int32, mesh), by_rows((b, shape.labels), jnp.int32, mesh),
    )  # fmt: skip
    opt_state = lies_whole(jax.eval_shape(tx.init, split.trainable), mesh)
    numbers = [shape_of((), kind, replicated(mesh)) for kind in (jnp.float32, jnp.int32)]
    with platform.compiling_for("tpu"):
        return step.lower(split.trainable, opt_state, split.frozen, batch, *numbers)


# --- answering ----------------------------------------------------------------------------------


class Answering(Engine):
    """The programs of answering, greedily, for a model on a mesh. To be lowered, not run."""

    def __init__(self, config: ModelConfig, mesh: Mesh, *, int8_cache: bool):
        self.mesh, self.model = mesh, model_shapes(config, mesh, stacked=False)
        self.model.llm.int8_cache = int8_cache
        super().__init__(self.model)
        self.plan = stages_of([SamplingParams()], config.llm.vocab)

    def lower_encode(self, images: int) -> Any:
        """The vision side on so many images."""
        graphdef, state = nnx.split(self.model)
        edge = self.config.vision.image_size
        pixels = shape_of((images, edge, edge, 3), jnp.uint8, replicated(self.mesh))

        def program(state: Any, pixels: jax.Array) -> jax.Array:  # as api.Model's
            model: Any = nnx.merge(graphdef, state)
            return constrain(model.encode(constrain(pixels, BATCH_AXES)[:, None]))

        with platform.compiling_for("tpu"):
            return jax.jit(on_mesh(program, self.mesh)).lower(state, pixels)

    def lower_prefill(self, rows: int, tokens: int, context: int, room: int = 256) -> Any:
        """Reading prompts of so many tokens into a cache of `context`."""
        with platform.compiling_for("tpu"):
            return self._start.lower(
                self._leaves, self._shapes(rows, tokens), context, room, self.plan
            )

    def lower_decode(self, rows: int, context: int, room: int = 256) -> Any:
        """The decoding loop over a cache of `context`; of its turns each makes a token a row."""
        with platform.compiling_for("tpu"):
            state = jax.eval_shape(
                lambda leaves, shapes: self._start(leaves, shapes, context, room, self.plan),
                self._leaves, self._shapes(rows, min(32, context)),
            )  # fmt: skip
            steps = shape_of((), jnp.int32, replicated(self.mesh))
            return self._decode.lower(self._leaves, self._placed(state), steps, self.plan)

    def _shapes(self, rows: int, tokens: int) -> Rows:
        c = self.config
        seeds = jnp.zeros(rows, jnp.uint32)
        keys = jax.eval_shape(lambda: jax.vmap(partial(jax.random.key, impl=PRNG))(seeds))
        number = jax.ShapeDtypeStruct((rows,), jnp.int32)
        real = jax.ShapeDtypeStruct((rows,), jnp.float32)
        found = Rows(
            jax.ShapeDtypeStruct((rows, tokens), jnp.int32), number,
            jax.ShapeDtypeStruct((rows, c.visual_tokens, c.llm.width), jnp.float32), number,
            jax.ShapeDtypeStruct((rows, 1, 2), jnp.int32), keys,
            SamplingParams(real, number, real, real, number, real, number),
        )  # fmt: skip
        return lies_whole(found, self.mesh)

    def _placed(self, state: State) -> State:
        """The shapes of a state, where the programs of the engine leave it."""
        axes = cache_axes(state.cache)

        def put(a: Any) -> Any:
            spec = P(*fitting(a.shape[: len(axes)], axes, self.mesh.shape))
            return shape_of(a.shape, a.dtype, NamedSharding(self.mesh, spec))

        cache = jax.tree.map(put, state.cache)
        return lies_whole(state._replace(cache=None), self.mesh)._replace(cache=cache)
