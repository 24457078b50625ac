"""Builds what a run needs from its configuration: data loader, weights on devices, compiled step."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.loader import DTYPES, check_trainable, load_model, open_tensors
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.arrays import PackedArrays, Padding
from minigpt4_jax.data.batching import ProcessShard
from minigpt4_jax.data.json_records import Example
from minigpt4_jax.data.loader import Loader, make_loader
from minigpt4_jax.data.packing import pack
from minigpt4_jax.data.readers import open_components
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.task import Task
from minigpt4_jax.parallel.multihost import is_multiprocess
from minigpt4_jax.parallel.sharding import replicated
from minigpt4_jax.processing.tokenizer import Tokenizer, load_tokenizer
from minigpt4_jax.training.benchmarks import read_tasks
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.evaluation import read_validation
from minigpt4_jax.training.mesh_selection import choose_mesh
from minigpt4_jax.training.model_config import read_model_config
from minigpt4_jax.training.optimizer import Schedule, make_optimizer, make_schedule
from minigpt4_jax.training.row_assignment import num_row_blocks, process_shard
from minigpt4_jax.training.train_step import (
    OptState,
    Split,
    Trainable,
    TrainStep,
    make_step,
    parts_with_dropout,
    split_model,
    trained_parts,
)
from minigpt4_jax.utils.platform import unrolls_layers


class RunInputs(NamedTuple):
    """What the user gave, checked: data, tokenizer and model (of its weights only the headers)."""

    model_config: ModelConfig
    tokenizer: Tokenizer
    trained_parts: frozenset[str]
    mesh: Mesh
    mesh_reason: str  # why this mesh, for the log
    loader: Loader
    validation_examples: list[Example]
    eval_tasks: list[Task]


def open_inputs(c: TrainConfig, exit_stack: ExitStack) -> RunInputs:
    """Check everything that the user gave, before anything is written. UserError: what is wrong.

    exit_stack: closes the loader.
    """
    config = read_model_config(c)
    tokenizer = load_tokenizer(model_directory.tokenizer_dir(c.model), config.tokenizer.kind)
    parts = trained_parts(freeze_vit=c.freeze_vit, freeze_qformer=c.freeze_qformer, config=config)
    mesh, mesh_reason = choose_mesh(c, config)
    loader = open_loader(c, config, tokenizer, mesh)
    exit_stack.callback(loader.close)
    validation_examples, eval_tasks = read_validation(c), read_tasks(c)
    check_trainable(c.model, config, parts)
    open_tensors(c.model, config)
    return RunInputs(
        config, tokenizer, parts, mesh, mesh_reason, loader, validation_examples, eval_tasks
    )


# --- data -----------------------------------------------------------------------------------


def open_loader(c: TrainConfig, config: ModelConfig, tokenizer: Tokenizer, mesh: Mesh) -> Loader:
    """The batches of a run; with several processes, of each batch the rows that this process's
    devices hold. UserError: what is wrong with the data."""
    return make_loader(
        open_components(c.data), c.data, config, tokenizer, batch_size=c.batch_size, seed=c.seed,
        multiple=c.accumulate, pack=_packing(c, config, tokenizer, mesh),
        shard=_sharding(c, mesh) if is_multiprocess() else None,
    )  # fmt: skip


def _sharding(c: TrainConfig, mesh: Mesh) -> Callable[[int], ProcessShard]:
    """rows of a batch -> those that this process makes."""
    multiple = c.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]

    def shard(rows: int) -> ProcessShard:
        if c.data.pack_tokens and rows % multiple:
            raise UserError(
                f"config.data.pack_tokens: batches of {rows} rows cannot be divided among the devices "
                f"of several processes: expected multiples of {multiple}, or pack_tokens=0"
            )
        return process_shard(mesh, rows)

    return shard


def _packing(
    c: TrainConfig, config: ModelConfig, tokenizer: Tokenizer, mesh: Mesh
) -> Callable[..., PackedArrays] | None:
    """What packs several examples into a row; None if the configuration does not pack."""
    d = c.data
    if d.pack_tokens == 0:
        return None
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    blocks = num_row_blocks(mesh)
    return partial(
        pack, width=d.pack_tokens, visual_tokens=config.visual_tokens, pad_id=tokenizer.pad_id,
        micro_batches=c.accumulate, padding=Padding(d.pad_tokens, d.pad_answers),
        rows_multiple=devices // blocks, blocks=blocks,
    )  # fmt: skip


# --- model ----------------------------------------------------------------------------------


class Program(NamedTuple):
    """The compiled part of a run, and its frozen weights."""

    split: Split  # without trainable arrays: the steps donate them
    learning_rate: Schedule
    step: TrainStep


def build_program(c: TrainConfig, inputs: RunInputs) -> tuple[Program, Trainable, OptState]:
    """Load the weights onto the devices and make the optimizer and the training step."""
    config, parts, mesh = inputs.model_config, inputs.trained_parts, inputs.mesh
    model, _ = load_model(
        c.model,
        c.dtype,
        stacked=not unrolls_layers(),
        trainable_parts=parts,
        quantize=c.frozen_dtype or None,
        lora=config.lora,
        seed=c.seed,
        mesh=mesh,
    )
    split = split_model(model, parts, jnp.dtype(DTYPES[c.dtype]))
    trainable, split = split.trainable, split._replace(trainable={})
    tx = make_optimizer(c, split.decay_mask)
    dropout_in = parts_with_dropout(config) & parts
    step = make_step(
        split, tx, mesh, accumulate=c.accumulate, remat=c.remat,
        dropout_seed=c.seed if dropout_in else None, dropout_in=dropout_in,
    )  # fmt: skip
    opt_state = jax.jit(tx.init, out_shardings=replicated(mesh))(trainable)
    return Program(split, make_schedule(c), step), trainable, opt_state
