"""Check the values of a configuration before anything is opened.

This is the only place that checks them: later code trusts a TrainConfig and its DataConfig.
"""

import dataclasses
import math
import re

from minigpt4_jax.data.config import MIX_BY, DataConfig, DatasetConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.quantization.schemes import FLOAT8
from minigpt4_jax.training.config import SCHEDULES, EvalConfig, LoraChoice, TrainConfig

_POSITIVE = (
    "steps", "batch_size", "accumulate", "log_every", "save_every", "keep", "eval_examples",
    "sample_images", "sample_tokens", "init_lr", "eps", "heartbeat_timeout",
)  # fmt: skip
_NON_NEGATIVE = (
    "llm_width", "max_text_length", "min_lr", "warmup_lr", "warmup_steps", "steps_per_epoch",
    "weight_decay", "clip", "eval_every", "sample_every", "seed", "qformer_lr_scale",
)  # fmt: skip


def check(c: TrainConfig, *, model: bool = True, data: bool = True) -> TrainConfig:
    """Return the configuration; UserError names the first field with an invalid value.

    model, data: whether a model and a dataset must be named.
    """
    for name in _POSITIVE:
        _require(name, getattr(c, name), getattr(c, name) > 0, "a number above 0")
    for name in _NON_NEGATIVE:
        _require(name, getattr(c, name), getattr(c, name) >= 0, "0 or more")
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        if isinstance(value, float):
            _require(f.name, value, math.isfinite(value), "a finite number")
    _check_loading(c.data)
    _check_lora(c.lora)
    _check_eval(c.eval)
    _require("dtype", c.dtype, c.dtype in ("bfloat16", "float32"), "bfloat16 or float32")
    _require("frozen_dtype", c.frozen_dtype, c.frozen_dtype in ("", FLOAT8), "'' or 'float8'")
    trained_vit = c.frozen_dtype == FLOAT8 and not c.freeze_vit
    expected = "'' with a trained vision encoder, or config.freeze_vit=true"
    _require("frozen_dtype", c.frozen_dtype, not trained_vit, expected)
    _require("schedule", c.schedule, c.schedule in SCHEDULES, " or ".join(SCHEDULES))
    _require("beta1", c.beta1, 0 <= c.beta1 < 1, "0 <= beta1 < 1")
    _require("beta2", c.beta2, 0 <= c.beta2 < 1, "0 <= beta2 < 1")
    _require("seed", c.seed, c.seed < 2**32, "less than 2**32")
    _require("decay_rate", c.decay_rate, 0 < c.decay_rate <= 1, "0 < decay_rate <= 1")
    divides = c.batch_size % c.accumulate == 0
    _require("batch_size", c.batch_size, divides, f"a multiple of accumulate ({c.accumulate})")
    template = c.prompt_template
    one_slot = not template or template.count("{}") == 1
    _require("prompt_template", template, one_slot, "one {} in it")
    named = bool(c.model) or not model
    _require("model", c.model, named, "a model directory: --config.model=DIR")
    named = bool(c.data.path or c.data.mix) or not data
    _require("data.path", c.data.path, named, "a dataset: --config.data.path=FILE_OR_DIR")
    _check_mixture(c.data, c.batch_size, c.accumulate)
    trains_qformer = c.qformer_lr_scale == 1 or not c.freeze_qformer
    expected = "1.0, as the Q-Former is frozen, or config.freeze_qformer=false"
    _require("qformer_lr_scale", c.qformer_lr_scale, trains_qformer, expected)
    needs_epoch = c.schedule == "step" and c.steps_per_epoch == 0
    expected = "a number above 0 with schedule=step"
    _require("steps_per_epoch", c.steps_per_epoch, not needs_epoch, expected)
    return c


def _check_loading(data: DataConfig) -> None:
    for name in ("workers", "timeout"):
        value = getattr(data, name)
        _require(f"data.{name}", value, 0 <= value < math.inf, "0 or more")
    _require("data.pack_tokens", data.pack_tokens, data.pack_tokens >= 0, "0 or more")
    for name in ("threads", "pad_tokens", "pad_answers"):
        value = getattr(data, name)
        _require(f"data.{name}", value, value > 0, "a number above 0")


def _check_lora(lora: LoraChoice) -> None:
    _require("lora.rank", lora.rank, lora.rank >= 0, "0 or more")
    _require("lora.alpha", lora.alpha, lora.alpha >= 0, "0 or more")
    _require("lora.dropout", lora.dropout, lora.dropout < 1, "less than 1")


def _check_eval(c: EvalConfig) -> None:
    _require("eval.every", c.every, c.every >= 0, "0 or more")
    for name in ("limit", "batch_size"):
        _require(f"eval.{name}", getattr(c, name), getattr(c, name) > 0, "a number above 0")
    named = bool(c.root) or not c.benchmarks
    _require("eval.root", c.root, named, "the folder of the benchmarks' files")
    _require(
        "eval.best", c.best, not c.best or bool(c.benchmarks), "nothing without eval.benchmarks"
    )


def _check_mixture(data: DataConfig, batch_size: int, accumulate: int) -> None:
    _require("data.mix_by", data.mix_by, data.mix_by in MIX_BY, " or ".join(MIX_BY))
    share = 0 <= data.max_broken <= 1
    _require("data.max_broken", data.max_broken, share, "a share from 0 to 1")
    for name, dataset in data.mix.items():
        _check_dataset(name, dataset, data.mix_by, batch_size, accumulate)
    if data.mix:
        used = any(d.ratio > 0 for d in data.mix.values())
        _require("data.mix", list(data.mix), used, "a dataset with a ratio above 0")
        _require("data.path", data.path, not data.path, "nothing beside data.mix")


def _check_dataset(
    name: str, d: DatasetConfig, mix_by: str, batch_size: int, accumulate: int
) -> None:
    """batch_size: of the datasets that have none of their own."""
    key = f"data.mix.{name}"
    is_name = re.fullmatch(r"[\w-]+", name) is not None
    _require(key, name, is_name, "a name of letters and digits")
    _require(f"{key}.ratio", d.ratio, 0 <= d.ratio < math.inf, "0 or more")
    _require(f"{key}.batch_size", d.batch_size, d.batch_size >= 0, "0 or more")
    _require(f"{key}.tokens", d.tokens, d.tokens >= 0, "0 or more")
    one = not (d.batch_size and d.tokens)
    _require(f"{key}.tokens", d.tokens, one, "0 with a batch_size, or no batch_size")
    size = d.batch_size or batch_size
    divides = size % accumulate == 0
    _require(f"{key}.batch_size", size, divides, f"a multiple of accumulate ({accumulate})")
    own_size = bool(d.batch_size or d.tokens) and mix_by == "example"
    _require(f"{key}.batch_size", size, not own_size, "none of its own with mix_by=example")
    tfds = d.reader == "tfds"
    matches = bool(d.dataset) == tfds
    _require(f"{key}.dataset", d.dataset, matches, "a name, only with reader=tfds")
    needs_path = d.ratio > 0 and not d.path and not tfds
    _require(f"{key}.path", d.path, not needs_path, f"its files: --config.{key}.path=...")


def _require(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"config.{key} is {value!r}: expected {expected}")
