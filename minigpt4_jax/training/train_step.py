"""One training step: loss, gradient and update of the trainable part, as one compiled program.

The model is taken apart once (`split_model`): what is trained is a flat dictionary, name -> float32
array, and so are its gradient and the optimizer's state; the rest is a tuple that only goes in.
Flat containers keep the cost of a call at a tenth of a millisecond.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from minigpt4_jax.checkpoint.loader import parameter_dtype
from minigpt4_jax.checkpoint.parameters import STACKED, part_of
from minigpt4_jax.models.minigpt import NO_DROPOUT, Batch, Dropout, MiniGpt
from minigpt4_jax.parallel.sharding import BATCH_AXES, constrain, mesh_of, with_mesh
from minigpt4_jax.training import optimizer

Trainable = dict[str, jax.Array]
Frozen = tuple[jax.Array, ...]


class Split(NamedTuple):
    """A model in two halves, and how they are joined again (inside or outside jit)."""

    trainable: Trainable  # dotted path -> float32 array
    frozen: Frozen
    join: Callable[[Trainable, Frozen], MiniGpt]
    decays: dict[str, bool]  # which of the trainable get weight decay


class Metrics(NamedTuple):
    """What a step reports; device scalars."""

    loss: jax.Array  # mean negative log-likelihood of a labelled token, before the update
    grad_norm: jax.Array
    tokens: jax.Array  # labelled tokens in the batch


def trained_parts(*, freeze_vit: bool, freeze_qformer: bool) -> frozenset[str]:
    """Names of the parts that are trained: the projection and LoRA always, as in the original."""
    parts = {"projection", "lora"}
    parts |= set() if freeze_vit else {"vit"}
    parts |= set() if freeze_qformer else {"qformer"}
    return frozenset(parts)


def is_trained(path: tuple, parts: frozenset[str]) -> bool:
    """Whether the parameter at an nnx path belongs to one of the trained parts."""
    return part_of(".".join(map(str, path))) in parts


def decays(path: tuple, shape: tuple[int, ...]) -> bool:
    """Weight decay is for tensors of two or more dimensions. A stacked [L, D] is L vectors; the
    class token, a vector here, is [1, 1, D] in the original."""
    dims = len(shape) - (path[:2] in STACKED)
    return dims >= 2 or path == ("vit", "cls")


def split_model(model: MiniGpt, parts: frozenset[str], dtype: jnp.dtype) -> Split:
    """Take a model apart; its trained arrays are then the step's, which donates them.

    dtype: what frozen matrices have; a trained one is a float32 master that is rounded to it for
    each step (the projection and LoRA compute in float32).
    """
    graphdef, *halves = nnx.split(model, lambda path, _: is_trained(path, parts), ...)
    hot, cold = halves
    hot_flat, cold_flat = list(nnx.to_flat_state(hot)), list(nnx.to_flat_state(cold))
    names = {".".join(map(str, path)): (path, leaf) for path, leaf in hot_flat}
    trainable = {name: leaf.get_value().astype(jnp.float32) for name, (_, leaf) in names.items()}

    def join(trainable: Trainable, frozen: Frozen) -> MiniGpt:
        flat = [
            (path, leaf.replace(trainable[name].astype(parameter_dtype(path, dtype))))
            for name, (path, leaf) in names.items()
        ]
        flat += [(p, leaf.replace(a)) for (p, leaf), a in zip(cold_flat, frozen, strict=True)]
        return nnx.merge(graphdef, nnx.from_flat_state(flat))

    mask = {name: decays(path, leaf.shape) for name, (path, leaf) in names.items()}
    frozen = tuple(leaf.get_value() for _, leaf in cold_flat)
    # What `join` keeps are shapes only: donated and replaced arrays must not live on in it.
    names = {n: (p, leaf.replace(None)) for n, (p, leaf) in names.items()}
    cold_flat = [(p, leaf.replace(None)) for p, leaf in cold_flat]
    return Split(trainable, frozen, join, mask)


Step = Callable[..., tuple[Trainable, Any, Metrics]]


def make_step(
    split: Split,
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    remat: bool = False,
    dropout_seed: int | None = None,
    dropout_in: Collection[str] = Dropout._fields,
) -> Step:
    """Compile-on-first-use step(trainable, opt_state, frozen, batch, rate, step).

    -> (trainable, opt_state, Metrics); trainable and opt_state are donated. accumulate: the batch
    runs as that many micro-batches, with the gradient of the mean over all its labelled tokens, as
    of one batch. dropout_seed: turns dropout on, in the parts that dropout_in names (fields of
    Dropout); masks follow from it, the step, the micro-batch and the layer.
    """

    def share(
        trainable: Trainable, frozen: Frozen, batch: Batch, count: Any, key: Any
    ) -> jax.Array:
        dropout = NO_DROPOUT
        if key is not None:
            keys = dict(zip(Dropout._fields, jax.random.split(key), strict=True))
            dropout = Dropout(**{part: keys[part] for part in dropout_in})
        nll = split.join(trainable, frozen).token_nll(batch, remat=remat, dropout=dropout)
        return nll.sum() / count  # this micro-batch's share of the mean

    def loss_and_grad(
        trainable: Trainable, frozen: Frozen, batch: Batch, count: Any, key: Any
    ) -> tuple[jax.Array, Trainable]:
        grad = jax.value_and_grad(share)
        if accumulate == 1:
            return grad(trainable, frozen, batch, count, key)
        # the size is spelled out: -1 cannot stand for it where rows have no images
        parts = lambda a: a.reshape(accumulate, a.shape[0] // accumulate, *a.shape[1:])  # noqa: E731
        micro = jax.tree.map(lambda a: constrain(parts(a), None, BATCH_AXES), batch)

        def add(total: Any, at: tuple[jax.Array, Batch]) -> tuple[Any, None]:
            index, part = at
            own = None if key is None else jax.random.fold_in(key, index)
            return jax.tree.map(jnp.add, total, grad(trainable, frozen, part, count, own)), None

        zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, trainable))
        return jax.lax.scan(add, zero, (jnp.arange(accumulate), micro))[0]

    def step(
        trainable: Trainable, opt_state: Any, frozen: Frozen, batch: Batch, rate: Any, index: Any
    ) -> tuple[Trainable, Any, Metrics]:
        count = (batch.label_positions >= 0).sum()
        key = None
        if dropout_seed is not None:
            key = jax.random.fold_in(jax.random.key(dropout_seed), index)
        loss, grads = loss_and_grad(trainable, frozen, batch, jnp.maximum(count, 1), key)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = optimizer.apply_updates(trainable, updates, rate)
        metrics = Metrics(loss, optax.global_norm(grads), count)
        return jax.tree.map(constrain, (trainable, opt_state, metrics))  # whole on every device

    return jax.jit(with_mesh(step, mesh_of(split.frozen)), donate_argnums=(0, 1))


def make_evaluation(split: Split) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """evaluate(trainable, frozen, batch) -> (summed negative log-likelihood, labelled tokens)."""

    def evaluate(trainable: Trainable, frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        nll = split.join(trainable, frozen).token_nll(batch)
        return constrain(nll.sum()), constrain((batch.label_positions >= 0).sum())

    return jax.jit(with_mesh(evaluate, mesh_of(split.frozen)))
