"""What a command asks to be compiled: a model, a run's configuration, a slice."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from minigpt4_jax.aot import programs
from minigpt4_jax.aot.presets import size_of
from minigpt4_jax.aot.report import Figures, Slice, figures
from minigpt4_jax.aot.roofline import needed_flops
from minigpt4_jax.aot.topology import chip_of, sides_of, slice_devices
from minigpt4_jax.checkpoint import weights
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.sharding import (
    describe,
    make_mesh,
    parameter_sharding,
    parse_mesh,
    sizes_for_inference,
)
from minigpt4_jax.training import config_cli
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.memory_estimate import Shape, longest
from minigpt4_jax.training.mesh_selection import choose_sizes
from minigpt4_jax.training.train_step import trained_parts

LARGEST = 1 << 20  # rows, or tokens of one: compilers count elements in 32 bits


@dataclass(frozen=True)
class Job:
    """Programs of one model for one slice."""

    name: str  # of the configuration
    size: str
    run: TrainConfig
    config: ModelConfig
    topology: str
    mesh: str | None
    tokens: int | None
    quantize: str | None = None
    int8_cache: bool = False
    batch: int = 1
    context: int = 2048
    keep: str | None = None  # folder for the programs' text
    code: bool = False  # make machine code, too

    def title(self) -> str:
        return (
            f"{self.name}, {self.size}, on {self.topology} ({len(self.devices)} chips); the compiler's "
            "figures and what published peaks allow, nothing was run"
        )

    @cached_property
    def devices(self) -> list[Any]:
        chip_of(self.topology), sides_of(self.topology)
        return slice_devices(self.topology)

    # --- where ------------------------------------------------------------------------------

    @cached_property
    def training(self) -> Slice:
        c = dataclasses.replace(self.run, mesh=self.mesh or self.run.mesh)
        count, chip = len(self.devices), chip_of(self.topology)
        sizes, why = choose_sizes(c, self.config, count, chip.usable)
        return Slice(self.topology, count, describe(make_mesh(sizes, self.devices)), why)

    @cached_property
    def answering(self) -> Slice:
        count = len(self.devices)
        sizes = sizes_for_inference(self.mesh or "auto", self.answering_config, count)
        asked = self.mesh not in (None, "", "auto")
        why = "as asked for" if asked else "heads over as many chips as they divide among"
        return Slice(self.topology, count, describe(make_mesh(sizes, self.devices)), why)

    def place(self, program: str) -> Slice:
        return self.training if program == "train" else self.answering

    def _mesh(self, where: Slice) -> Mesh:
        text = where.mesh if where.chips > 1 else "data:1"
        return make_mesh(parse_mesh(text, where.chips), self.devices)

    # --- how many rows ----------------------------------------------------------------------

    def with_rows(self, program: str, rows: int) -> "Job":
        """The same with so many rows at once."""
        if program == "train":
            return dataclasses.replace(
                self, run=dataclasses.replace(self.run, batch_size=rows, accumulate=1)
            )
        return dataclasses.replace(self, batch=rows)

    def first_rows(self, program: str) -> int:
        """About as many as are asked for, and one for every chip, or a power of two of them."""
        train = program == "train"
        asked = self.run.batch_size // self.run.accumulate if train else self.batch
        chips = len(self.devices)
        return chips << max(0, math.ceil(math.log2(asked / chips)))

    def least_rows(self, program: str) -> int:
        """The fewest that a mesh which was asked for divides."""
        text = self.mesh or (self.run.mesh if program == "train" else "auto")
        if text in ("", "auto"):
            return 1
        sizes = parse_mesh(text, len(self.devices))
        return sizes["data"] * sizes["fsdp"] if program == "train" else 1

    # --- what -------------------------------------------------------------------------------

    @property
    def answering_config(self) -> ModelConfig:
        return dataclasses.replace(self.config, quantize=self.quantize or self.config.quantize)

    @property
    def shape(self) -> Shape:
        """Rows of the longest answer that the configuration lets in, with one image."""
        return longest(self.run, self.config, self.tokens)

    def figures(self, program: str) -> Figures:
        """Compile one of train, encode, prefill and decode."""
        return self._train() if program == "train" else self._answer(program)

    def _train(self) -> Figures:
        c, shape = self.run, self.shape
        parts = trained_parts(freeze_vit=c.freeze_vit, freeze_qformer=c.freeze_qformer)
        weights.check_masters(self.size, self.config, parts)
        split = f" in {c.accumulate} parts" if c.accumulate > 1 else ""
        remat = ", layers computed again" if c.remat else ""
        return figures(
            "train",
            f"{shape.rows} rows of {shape.tokens} tokens{split}{remat}", shape.rows,
            lambda: programs.train_step(c, self.config, self._mesh(self.training), shape),
            self.training,
            needed=needed_flops(self.config, *shape, parts),
            keep=self._keeper("train"), code=self.code,
        )  # fmt: skip

    def _answer(self, program: str) -> Figures:
        config, mesh = self.answering_config, self._mesh(self.answering)
        of = programs.Answering(config, mesh, int8_cache=self.int8_cache)
        rows, context = self.batch, self.context
        make = {
            "encode": lambda: of.lower_encode(rows),
            "prefill": lambda: of.lower_prefill(rows, context, context),
            "decode": lambda: of.lower_decode(rows, context),
        }[program]
        what = {
            "encode": f"{rows} images",
            "prefill": f"{rows} prompts of {context} tokens",
            "decode": f"{rows} rows, a cache of {context} tokens",
        }[program]
        held = "bfloat16" if config.quantize is None else config.quantize
        return figures(
            program, f"{what}, {held}", rows, make, self.answering,
            needed=self._needed(program), beside=self._beside(program, mesh),
            keep=self._keeper(program), code=self.code,
        )  # fmt: skip

    def _needed(self, program: str) -> float:
        """Operations of all chips; the language model's alone, or the vision side's."""
        config, rows = self.answering_config, self.batch
        vision = needed_flops(config, rows, 0, 0, None)
        if program == "encode":
            return vision
        tokens = self.context if program == "prefill" else 1
        found = needed_flops(config, rows, tokens, 1, None) - vision
        if program == "decode":  # one token looks at all of the cache
            c = config.llm
            found += 4.0 * rows * self.context * c.heads * c.head_dim * c.layers
        return found

    def _beside(self, program: str, mesh: Mesh) -> int:
        """Bytes on a chip of weights that the program does not use."""
        vision = program == "encode"
        total = 0
        for name, shape, kind in programs.parameters(self.answering_config):
            if name.startswith("llm.") == vision:
                where = parameter_sharding(name, shape, kind, self.answering_config, mesh)
                total += math.prod(where.shard_shape(shape)) * kind.itemsize
        return total

    def _keeper(self, program: str) -> Any:
        if self.keep is None:
            return None
        return (Path(self.keep) / f"{program}.hlo.txt").write_text


def read(options: argparse.Namespace, rest: Sequence[str]) -> Job:
    """The job of a command line. UserError: anything wrong with it."""
    for name in ("tokens", "batch", "context"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= LARGEST:
            raise UserError(f"--{name}={value}: expected a number above 0, up to {LARGEST:,}")
    given = any(arg.partition("=")[0] in ("--config", "-config") for arg in rest)
    rest = list(rest) if given else ["--config=stage2", *rest]
    spec, _ = config_cli.split_config_argument(rest)
    c, _ = config_cli.parse(rest, sizes_only=True)
    if c.dtype != "bfloat16":
        raise UserError(f"config.dtype is {c.dtype!r}: expected bfloat16, which TPUs are made for")
    size, config = size_of(c, options.size)
    for name in ("tokens", "context"):
        value, image = getattr(options, name), config.visual_tokens
        if value is not None and value <= image:
            raise UserError(f"--{name}={value}: expected more than {image}, which an image takes")
    if options.quantize and config.quantize not in (None, options.quantize):
        raise UserError(
            f"--quantize={options.quantize}: {size} is stored in {config.quantize}: leave it out"
        )
    return Job(
        spec, size, c, config, options.topology, options.mesh, options.tokens,
        options.quantize, options.kv_cache == "int8", options.batch, options.context, options.hlo,
        options.code,
    )  # fmt: skip
