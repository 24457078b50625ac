"""What to compile: a model, a training or inference configuration, and a TPU slice or GPUs."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from minigpt4_jax.aot import programs
from minigpt4_jax.aot.chip import Chip
from minigpt4_jax.aot.presets import model_for
from minigpt4_jax.aot.report import Report, Target, compile_and_report
from minigpt4_jax.aot.roofline import count_model_flops, uses_parameter
from minigpt4_jax.aot.topology import chip_of, slice_devices, slice_shape
from minigpt4_jax.checkpoint.loader import check_trainable
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.parallel.sharding import (
    describe_mesh,
    inference_mesh_sizes,
    make_mesh,
    parameter_sharding,
    parse_mesh,
)
from minigpt4_jax.training import config_cli
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.memory_estimate import BatchShape, largest_batch
from minigpt4_jax.training.mesh_selection import choose_mesh_sizes
from minigpt4_jax.training.model_config import frozen_config
from minigpt4_jax.training.train_step import trained_parts

MAX_SIZE = 1 << 20  # rows, or tokens of a row: compilers count elements in 32 bits


@dataclass(frozen=True)
class Job:
    """Programs of one model for one slice."""

    config_name: str
    model_name: str
    train_config: TrainConfig
    model_config: ModelConfig
    topology: str
    mesh: str | None = None  # None: chosen automatically
    tokens: int | None = None  # of a training row; None: of the longest answer
    quantize_base: str | None = None  # training only: a base that is stored in int8 or int4
    quantize: str | None = None  # inference only, as are the next three
    kv_cache: str | None = None
    batch_size: int = 1
    context: int = 2048  # tokens
    hlo_dir: str | None = None  # where to save the HLO text
    machine_code: bool = False

    def title(self) -> str:
        return (
            f"{self.config_name}, {self.model_name}, on {self.topology} "
            f"({len(self.devices)} {self._devices_name}); "
            "figures of the compiler and a roofline of published peaks, nothing was run"
        )

    @property
    def chip(self) -> Chip:
        """What programs are compiled for."""
        return chip_of(self.topology)

    @cached_property
    def devices(self) -> list[Any]:
        slice_shape(self.topology)  # raises UserError with a better message than libtpu's
        return slice_devices(self.topology)

    @property
    def _devices_name(self) -> str:
        name = "GPU" if self.chip.platform == "gpu" else "chip"
        return name if len(self.devices) == 1 else f"{name}s"

    def without_devices(self) -> "Job":
        """A copy that can be pickled: devices are looked up again."""
        return dataclasses.replace(self)

    # --- mesh -------------------------------------------------------------------------------

    @cached_property
    def train_target(self) -> Target:
        c = dataclasses.replace(self.train_config, mesh=self.mesh or self.train_config.mesh)
        axis_sizes, reason = choose_mesh_sizes(
            c, self.trained_config, len(self.devices), self.chip.usable_hbm
        )
        return self._target(axis_sizes, reason)

    @cached_property
    def inference_target(self) -> Target:
        config, requested = self.inference_config, self.mesh or "auto"
        axis_sizes = inference_mesh_sizes(requested, config, len(self.devices))
        automatic = "heads split over as many chips as divide them"
        return self._target(axis_sizes, automatic if requested == "auto" else "as requested")

    def _target(self, axis_sizes: dict[str, int], reason: str) -> Target:
        mesh = describe_mesh(make_mesh(axis_sizes, self.devices))
        return Target(self.topology, len(self.devices), mesh, reason)

    def target(self, program: str) -> Target:
        return self.train_target if program == "train" else self.inference_target

    def _mesh(self, target: Target) -> Mesh:
        text = target.mesh if target.num_chips > 1 else "data:1"
        return make_mesh(parse_mesh(text, target.num_chips), self.devices)

    # --- batch size -------------------------------------------------------------------------

    def with_rows(self, program: str, rows: int) -> "Job":
        """A copy that processes `rows` at once."""
        if program == "train":
            c = dataclasses.replace(self.train_config, batch_size=rows, accumulate=1)
            return dataclasses.replace(self, train_config=c)
        return dataclasses.replace(self, batch_size=rows)

    def initial_rows(self, program: str) -> int:
        """The configured batch rounded up to a power of two times the number of chips."""
        c, num_chips = self.train_config, len(self.devices)
        rows = c.micro_batch_size if program == "train" else self.batch_size
        return num_chips << max(0, math.ceil(math.log2(rows / num_chips)))

    def min_rows(self, program: str) -> int:
        """The smallest batch that a requested mesh divides."""
        if program != "train":
            return 1
        text = self.mesh or self.train_config.mesh
        if text in ("", "auto"):
            return 1
        axis_sizes = parse_mesh(text, len(self.devices))
        return axis_sizes["data"] * axis_sizes["fsdp"]

    # --- programs ---------------------------------------------------------------------------

    @property
    def trained_config(self) -> ModelConfig:
        quantize = self.quantize_base or self.model_config.quantize
        config = dataclasses.replace(self.model_config, quantize=quantize)
        return frozen_config(self.train_config, config)

    @property
    def inference_config(self) -> ModelConfig:
        quantize = self.quantize or self.model_config.quantize
        return dataclasses.replace(self.model_config, quantize=quantize)

    @property
    def batch_shape(self) -> BatchShape:
        """Training rows of the longest allowed answer, with one image each."""
        return largest_batch(self.train_config, self.model_config, self.tokens)

    def compile(self, program: str) -> Report:
        """Compile one of train, encode, prefill and decode."""
        return self._compile_train() if program == "train" else self._compile_inference(program)

    def _compile_train(self) -> Report:
        c, shape = self.train_config, self.batch_shape
        config = self.trained_config
        trained = trained_parts(
            freeze_vit=c.freeze_vit, freeze_qformer=c.freeze_qformer, config=config
        )
        check_trainable(self.model_name, config, trained)
        accumulation = f" in {c.accumulate} accumulation steps" if c.accumulate > 1 else ""
        remat = ", remat" if c.remat else ""
        base = f", {config.quantize} base" if config.quantize else ""
        return compile_and_report(
            "train",
            f"{shape.rows} rows of {shape.tokens} tokens{accumulation}{remat}{base}",
            shape.rows,
            lambda: programs.lower_train_step(
                c, config, self._mesh(self.train_target), shape, self.chip
            ),
            self.train_target,
            model_flops=count_model_flops(self.model_config, *shape, trained),
            save_hlo=self._hlo_writer("train"),
            machine_code=self.machine_code,
        )

    def _compile_inference(self, program: str) -> Report:
        config, mesh = self.inference_config, self._mesh(self.inference_target)
        engine = programs.AbstractEngine(config, mesh, kv_cache=self.kv_cache, chip=self.chip)
        rows, context = self.batch_size, self.context
        lower: Callable[[], Any]
        description, lower = {
            "encode": (f"{rows} images", lambda: engine.lower_encode(rows)),
            "prefill": (
                f"{rows} prompts of {context} tokens",
                lambda: engine.lower_prefill(rows, context, context),
            ),
            "decode": (
                f"{rows} rows, a cache of {context} tokens",
                lambda: engine.lower_decode(rows, context),
            ),
        }[program]
        return compile_and_report(
            program, f"{description}, {config.quantize or 'bfloat16'}", rows, lower,
            self.inference_target, model_flops=self._inference_flops(program),
            other_weights=self._unused_weight_bytes(program, mesh),
            save_hlo=self._hlo_writer(program), machine_code=self.machine_code,
        )  # fmt: skip

    def _inference_flops(self, program: str) -> float:
        """Required FLOPs over all chips: of the vision side for encode, else of the language model."""
        config, rows = self.inference_config, self.batch_size
        vision = count_model_flops(config, rows, 0, 0, None)
        if program == "encode":
            return vision
        # With an encoder, a step of decoding reads no token of the prompt.
        tokens = self.context if program == "prefill" else int(not config.llm.encoder_layers)
        flops = count_model_flops(config, rows, tokens, 1, None) - vision
        if program == "decode":  # one token attends to the whole cache
            c = config.llm
            flops += 4.0 * rows * self.context * c.heads * c.head_dim * c.layers
        return flops

    def _unused_weight_bytes(self, program: str, mesh: Mesh) -> int:
        """Bytes per chip of weights that stay in HBM but that the program does not use."""
        config, total = self.inference_config, 0
        for name, shape, dtype in programs.parameter_specs(config):
            if not uses_parameter(program, name, config):
                sharding = parameter_sharding(name, shape, dtype, config, mesh)
                total += math.prod(sharding.shard_shape(shape)) * dtype.itemsize
        return total

    def _hlo_writer(self, program: str) -> Callable[[str], Any] | None:
        if self.hlo_dir is None:
            return None
        return (Path(self.hlo_dir) / f"{program}.hlo.txt").write_text


def parse_job(options: argparse.Namespace, config_args: Sequence[str]) -> Job:
    """The job of a command line. config_args: --config and --config.KEY=VALUE.

    UserError: an option or a configuration value is invalid.
    """
    for name in ("tokens", "batch", "context"):
        value = getattr(options, name)
        if value is not None and not 0 < value <= MAX_SIZE:
            raise UserError(f"--{name}={value}: expected a number above 0, up to {MAX_SIZE:,}")
    has_config = any(arg.partition("=")[0] in ("--config", "-config") for arg in config_args)
    config_args = list(config_args) if has_config else ["--config=stage2", *config_args]
    config_name, _ = config_cli.split_config_argument(config_args)
    c, _ = config_cli.parse(config_args, sizes_only=True)
    if c.dtype != "bfloat16":
        raise UserError(
            f"config.dtype is {c.dtype!r}: expected bfloat16, the type that TPUs and GPUs compute in"
        )
    model_name, model_config = model_for(c, options.size)
    for name in ("tokens", "context"):
        value, image_tokens = getattr(options, name), model_config.visual_tokens
        if value is not None and value <= image_tokens:
            raise UserError(
                f"--{name}={value}: expected more than {image_tokens}, the tokens of an image"
            )
    for name, scheme in (("quantize", options.quantize), ("quantize-base", options.quantize_base)):
        if scheme and model_config.quantize not in (None, scheme):
            raise UserError(
                f"--{name}={scheme}: {model_name} is stored in {model_config.quantize}: omit the option"
            )
    if c.frozen_dtype and (stored := options.quantize_base or model_config.quantize):
        raise UserError(
            f"config.frozen_dtype is {c.frozen_dtype!r}: the base is in {stored}; leave one of them out"
        )
    is_gpu = chip_of(options.topology).platform == "gpu"
    return Job(
        config_name, model_name, c, model_config, options.topology, options.mesh,
        tokens=options.tokens, quantize_base=options.quantize_base,
        quantize=options.quantize, kv_cache=options.kv_cache,
        batch_size=options.batch, context=options.context, hlo_dir=options.hlo,
        machine_code=options.code or is_gpu,  # the compiler for GPUs takes seconds as a whole
    )  # fmt: skip
