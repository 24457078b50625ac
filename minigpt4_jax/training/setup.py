"""What a run is made of, from its configuration: batches, weights on their devices, optimizer, step."""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from minigpt4_jax.checkpoint.loader import DTYPES, load_model
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.batching import Padding, ProcessShard
from minigpt4_jax.data.loader import Loader, make_loader
from minigpt4_jax.data.packing import PackedArrays, pack
from minigpt4_jax.data.readers import open_components
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.multihost import is_multiprocess
from minigpt4_jax.parallel.sharding import replicated
from minigpt4_jax.processing.tokenizer import Tokenizer
from minigpt4_jax.training import optimizer
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.mesh_selection import blocks_of, share_of
from minigpt4_jax.training.train_step import Split, Step, Trainable, make_step, split_model


def open_loader(c: TrainConfig, config: ModelConfig, tokenizer: Tokenizer, mesh: Mesh) -> Loader:
    """The batches of a run: of each the rows that this process's devices take. UserError: what is
    wrong with the data."""
    components = open_components(c.data)
    packing = _packing(c, config, tokenizer, mesh)
    shard = _shard(c, mesh) if is_multiprocess() else None
    return make_loader(
        components, c.data, config, tokenizer, batch_size=c.batch_size, seed=c.seed,
        multiple=c.accumulate, shard=shard, pack=packing,
    )  # fmt: skip


def _shard(c: TrainConfig, mesh: Mesh) -> Callable[[int], ProcessShard]:
    """Which rows of a batch this process makes."""
    multiple = c.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]

    def shard(rows: int) -> ProcessShard:
        if c.data.pack_tokens and rows % multiple:
            raise UserError(
                f"config.data.pack_tokens: batches of {rows} rows do not divide among the devices of "
                f"several processes: expected multiples of {multiple}, or pack_tokens=0"
            )
        return share_of(mesh, rows)

    return shard


def _packing(
    c: TrainConfig, config: ModelConfig, tokenizer: Tokenizer, mesh: Mesh
) -> Callable[..., PackedArrays] | None:
    d = c.data
    if d.pack_tokens == 0:
        return None
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    blocks = blocks_of(mesh)
    return partial(
        pack, width=d.pack_tokens, visual_tokens=config.visual_tokens, pad_id=tokenizer.pad_id,
        micro_batches=c.accumulate, padding=Padding(d.pad_tokens, d.pad_answers),
        rows_multiple=devices // blocks, blocks=blocks,
    )  # fmt: skip


class Built(NamedTuple):
    """What is trained, and how."""

    split: Split  # without its trainable arrays, which the first step is given
    trainable: Trainable
    opt_state: Any
    rate: optimizer.Schedule
    update: Step


def build(c: TrainConfig, config: ModelConfig, parts: Collection[str], mesh: Mesh) -> Built:
    """Weights onto the devices, the optimizer and the program of a step; `parts` are trained."""
    parts = frozenset(parts)
    model, _ = load_model(
        c.model, c.dtype, trainable_parts=parts, lora=config.lora, seed=c.seed, mesh=mesh
    )
    split = split_model(model, parts, jnp.dtype(DTYPES[c.dtype]))
    trainable, split = split.trainable, split._replace(trainable={})
    tx = optimizer.adamw(
        split.decays, betas=(c.beta1, c.beta2), eps=c.eps, weight_decay=c.weight_decay, clip=c.clip
    )
    rate = optimizer.make_schedule(
        c.schedule, init_lr=c.init_lr, min_lr=c.min_lr, warmup_lr=c.warmup_lr,
        warmup_steps=c.warmup_steps, steps=c.steps, steps_per_epoch=c.steps_per_epoch,
        decay_rate=c.decay_rate,
    )  # fmt: skip
    dropout_in = _dropout_in(config) & parts
    update = make_step(
        split, tx, accumulate=c.accumulate, remat=c.remat,
        dropout_seed=c.seed if dropout_in else None, dropout_in=dropout_in,
    )  # fmt: skip
    opt_state = jax.jit(tx.init, out_shardings=replicated(mesh))(trainable)
    return Built(split, trainable, opt_state, rate, update)


def _dropout_in(config: ModelConfig) -> set[str]:
    """The parts that have dropout."""
    q, lora = config.qformer, config.lora
    rates = {"qformer": q.dropout if q else 0.0, "lora": lora.dropout if lora else 0.0}
    return {part for part, rate in rates.items() if rate > 0}
