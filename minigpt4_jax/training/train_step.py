"""One training step: loss, gradient and update of the trainable parameters, as one compiled program.

The model is split once (`split_model`). The trainable parameters are a flat dictionary, name -> float32
array, and so are their gradient and the optimizer state; the frozen ones are a tuple of arrays. With flat
containers, dispatching a step takes a tenth of a millisecond.
"""

from collections.abc import Callable, Collection
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.checkpoint.loader import parameter_dtype
from minigpt4_jax.checkpoint.parameters import STACKED, ParameterPath, part_of, stacked_path
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.minigpt import NO_DROPOUT, Batch, Dropout, MiniGpt
from minigpt4_jax.models.vit import pad_patch_weight
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain, with_mesh
from minigpt4_jax.training import optimizer
from minigpt4_jax.utils.platform import compiler_options

Trainable = dict[str, jax.Array]  # dotted path -> float32 array
Frozen = tuple[jax.Array, ...]
OptState = Any  # optax's state, a PyTree


class Split(NamedTuple):
    """A model in two halves, and the function that joins them again (inside or outside jit)."""

    trainable: Trainable
    frozen: Frozen
    join: Callable[[Trainable, Frozen], MiniGpt]
    decay_mask: dict[str, bool]  # which of the trainable parameters get weight decay


class Metrics(NamedTuple):
    """What a step reports, as device scalars."""

    loss: jax.Array  # mean negative log-likelihood per labelled token, before the update
    grad_norm: jax.Array  # global norm
    tokens: jax.Array  # labelled tokens in the batch
    terms: dict[str, jax.Array]  # what the loss is the sum of, by name; none if it is a single term


def trained_parts(
    *, freeze_vit: bool, freeze_qformer: bool, config: ModelConfig | None = None
) -> frozenset[str]:
    """Names of the trained parts: always the projection and LoRA, as in the original.

    config: of BLIP-2, whose ln_vision is trained together with its Q-Former.
    """
    parts = {"projection", "lora"}
    if not freeze_vit:
        parts |= {"vit", "ln_vision"}
    if not freeze_qformer:
        parts.add("qformer")
        if config is not None and config.image_first:
            parts.add("ln_vision")
    return frozenset(parts)


def is_trained(path: ParameterPath, parts: frozenset[str]) -> bool:
    """Whether the parameter at an nnx path belongs to one of these parts."""
    name = ".".join(map(str, path))
    return ("ln_vision" if path[0] == "ln_vision" else part_of(name)) in parts


def is_decayed(path: ParameterPath, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies: to tensors of two or more dimensions. A stacked [L, D] counts as
    L vectors; the class token, a vector here, is [1, 1, D] in the original."""
    dims = len(shape) - (path[:2] in STACKED)
    return dims >= 2 or path == ("vit", "cls")


def split_model(model: MiniGpt, parts: frozenset[str], dtype: "np.dtype[Any]") -> Split:
    """Split a model into the parameters of `parts`, which are trained, and the frozen rest.

    dtype: of the frozen matrices. Trainable parameters are float32 masters, cast to it in every step;
    the projection and LoRA compute in float32. The trainable arrays are to be donated to the step.
    Of layers in a list the frozen arrays stay apart, and the trainable ones are stacked: names, checkpoints
    and the optimizer state are the same for both layouts.
    """
    graphdef, *states = nnx.split(model, lambda path, _: is_trained(path, parts), ...)
    trainable_state, frozen_state = states
    variables: dict[str, list[tuple[ParameterPath, Any]]] = {}
    for path, variable in nnx.to_flat_state(trainable_state):
        name = ".".join(map(str, stacked_path(path)))
        variables.setdefault(name, []).append((path, variable))
    frozen_variables = list(nnx.to_flat_state(frozen_state))
    trainable = {name: _stack(layers).astype(jnp.float32) for name, layers in variables.items()}
    frozen = tuple(_frozen_array(path, variable) for path, variable in frozen_variables)
    decay_mask = {
        name: is_decayed(stacked_path(layers[0][0]), trainable[name].shape)
        for name, layers in variables.items()
    }
    # `join` must not keep the arrays alive, which are donated or replaced later.
    variables = {
        name: [(path, v.replace(None)) for path, v in layers] for name, layers in variables.items()
    }
    frozen_variables = [(path, v.replace(None)) for path, v in frozen_variables]

    def join(trainable: Trainable, frozen: Frozen) -> MiniGpt:
        flat = []
        for name, layers in variables.items():
            array = trainable[name].astype(parameter_dtype(layers[0][0], dtype))
            for (path, variable), layer in zip(layers, _unstack(array, layers), strict=True):
                flat.append((path, variable.replace(layer)))
        flat += [
            (path, variable.replace(array))
            for (path, variable), array in zip(frozen_variables, frozen, strict=True)
        ]
        return nnx.merge(graphdef, nnx.from_flat_state(flat))

    return Split(trainable, frozen, join, decay_mask)


def _frozen_array(path: ParameterPath, variable: Any) -> jax.Array:
    """The array of a frozen parameter, as steps multiply it."""
    array: jax.Array = variable.get_value()
    return pad_patch_weight(array) if path == ("vit", "patch", "weight") else array


def _stack(layers: list[tuple[ParameterPath, Any]]) -> jax.Array:
    """The array of a parameter; of layers in a list, their arrays as [L, ...], in the order of the layers."""
    path, variable = layers[0]
    if stacked_path(path) == path:
        array: jax.Array = variable.get_value()
        return array
    layers.sort(key=lambda layer: layer[0][2])
    return jnp.stack([variable.get_value() for _, variable in layers])


def _unstack(array: jax.Array, layers: list[tuple[ParameterPath, Any]]) -> list[jax.Array]:
    """The inverse of `_stack`, whose gradient is one concatenation."""
    path, _ = layers[0]
    if stacked_path(path) == path:
        return [array]
    return [a[0] for a in jax.lax.split(array, [1] * len(layers))]


def parts_with_dropout(config: ModelConfig) -> set[str]:
    """The parts of a model that have dropout, or draw by its keys."""
    rates = {
        "qformer": config.qformer.dropout if config.qformer else 0.0,
        "lora": config.lora.dropout if config.lora else 0.0,
    }
    if config.is_stage1:  # its negatives are drawn by the same key
        return {"qformer"}
    return {part for part, rate in rates.items() if rate > 0}


TrainStep = Callable[..., tuple[Trainable, OptState, Metrics]]
EvalStep = Callable[[Trainable, Frozen, Batch], tuple[jax.Array, jax.Array]]


def make_step(
    split: Split,
    tx: optax.GradientTransformation,
    mesh: Mesh | None,
    *,
    accumulate: int = 1,
    remat: bool = False,
    dropout_seed: int | None = None,
    dropout_in: Collection[str] = Dropout._fields,
) -> TrainStep:
    """A jitted step(trainable, opt_state, frozen, batch, learning_rate, step_number)
    -> (trainable, opt_state, Metrics). trainable and opt_state are donated.

    mesh: the mesh that the arrays are on; None: a single device.
    accumulate: the batch is processed in this many micro-batches. The gradient is that of the mean over
    all labelled tokens of the batch, as without accumulation.
    remat: recompute activations in the backward pass.
    dropout_seed: enables dropout in the parts `dropout_in` (fields of Dropout). Masks are a function of
    the seed, the step, the micro-batch and the layer.
    """

    loss_and_grads = _accumulated(
        jax.value_and_grad(_loss_share(split, remat, dropout_in), has_aux=True), accumulate
    )

    def step(
        trainable: Trainable,
        opt_state: OptState,
        frozen: Frozen,
        batch: Batch,
        learning_rate: jax.Array,
        step_number: jax.Array,
    ) -> tuple[Trainable, OptState, Metrics]:
        num_tokens = (batch.label_positions >= 0).sum()
        key = None
        if dropout_seed is not None:
            key = jax.random.fold_in(jax.random.key(dropout_seed), step_number)
        (loss, terms), grads = loss_and_grads(
            trainable, frozen, batch, jnp.maximum(num_tokens, 1), key
        )
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optimizer.apply_updates(trainable, updates, learning_rate)
        metrics = Metrics(loss, optax.global_norm(grads), num_tokens, terms)
        replicated: tuple[Trainable, OptState, Metrics] = jax.tree.map(
            constrain, (trainable, opt_state, metrics)
        )
        return replicated

    compiled: TrainStep = jax.jit(
        with_mesh(step, mesh), donate_argnums=(0, 1), compiler_options=compiler_options("products")
    )
    return compiled


def _loss_share(
    split: Split, remat: bool, dropout_in: Collection[str]
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """(trainable, frozen, batch, labelled tokens of the whole batch, dropout key or None) -> the share of
    this micro-batch in the batch's mean loss, and its terms, if there are several."""

    def loss_share(
        trainable: Trainable,
        frozen: Frozen,
        batch: Batch,
        num_tokens: jax.Array,
        key: jax.Array | None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        dropout = NO_DROPOUT
        if key is not None:
            keys = dict(zip(Dropout._fields, jax.random.split(key), strict=True))
            dropout = Dropout(**{part: keys[part] for part in dropout_in})
        sums = split.join(trainable, frozen).loss_sums(batch, remat=remat, dropout=dropout)
        total = reduce(jnp.add, sums.values())
        terms = {n: term / num_tokens for n, term in sums.items()} if len(sums) > 1 else {}
        return total / num_tokens, terms

    return loss_share


def _accumulated(value_and_grad: Callable[..., Any], accumulate: int) -> Callable[..., Any]:
    """The sum of value_and_grad(trainable, frozen, batch, num_tokens, key) over `accumulate` micro-batches
    of the batch: ((loss, terms), gradient). Each has its own dropout key."""
    if accumulate == 1:
        return value_and_grad
    # Traced once, for the shapes and for the loop.
    value_and_grad = jax.jit(value_and_grad, inline=True)

    def to_micro_batches(a: jax.Array) -> jax.Array:
        # no -1 for the size: it is ambiguous for rows without images
        micro = a.reshape(accumulate, a.shape[0] // accumulate, *a.shape[1:])
        return constrain(micro, None, BATCH_AXES)

    def loss_and_grads(
        trainable: Trainable,
        frozen: Frozen,
        batch: Batch,
        num_tokens: jax.Array,
        key: jax.Array | None,
    ) -> Any:
        def add(total: Any, numbered: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, micro_batch = numbered
            micro_key = None if key is None else jax.random.fold_in(key, index)
            term = value_and_grad(trainable, frozen, micro_batch, num_tokens, micro_key)
            return jax.tree.map(jnp.add, total, term), None

        micro_batches = jax.tree.map(to_micro_batches, batch)
        first = jax.tree.map(lambda a: a[0], micro_batches)
        shapes = jax.eval_shape(value_and_grad, trainable, frozen, first, num_tokens, key)
        zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), micro_batches))
        return total

    return loss_and_grads


def make_evaluation(split: Split, mesh: Mesh | None) -> EvalStep:
    """A jitted evaluate(trainable, frozen, batch) -> (summed negative log-likelihood, labelled
    tokens). mesh: as for `make_step`."""

    def evaluate(trainable: Trainable, frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        total = reduce(jnp.add, split.join(trainable, frozen).loss_sums(batch).values())
        return constrain(total), constrain((batch.label_positions >= 0).sum())

    options = compiler_options("products")
    compiled: EvalStep = jax.jit(with_mesh(evaluate, mesh), compiler_options=options)
    return compiled
