"""Whether the values of a configuration make sense, said before anything is opened."""

import dataclasses
import math
import re
from typing import Any

from minigpt4_jax.data.config import DataConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.training.config import TrainConfig

# As in training.optimizer and data.mixture, which are not imported: they would import JAX and Grain.
SCHEDULES = ("cosine", "step")
MIXED_BY = ("step", "example")


def check(c: TrainConfig, *, model: bool = True, data: bool = True) -> TrainConfig:
    """Return the configuration; UserError names the first field whose value makes no sense.
    model, data: one must be named."""
    positive = (
        "steps", "batch_size", "accumulate", "log_every", "save_every", "keep", "eval_examples",
        "sample_images", "sample_tokens", "init_lr", "eps", "heartbeat_timeout",
    )  # fmt: skip
    non_negative = (
        "llm_width", "max_text_length", "min_lr", "warmup_lr", "warmup_steps", "steps_per_epoch",
        "weight_decay", "clip", "eval_every", "sample_every", "seed",
    )  # fmt: skip
    for name in positive:
        _require(c, name, getattr(c, name) > 0, "a number above 0")
    for name in non_negative:
        _require(c, name, getattr(c, name) >= 0, "0 or more")
    for f in dataclasses.fields(c):
        value = getattr(c, f.name)
        _require(c, f.name, not isinstance(value, float) or math.isfinite(value), "a finite number")
    for name in ("workers", "timeout"):
        value = getattr(c.data, name)
        _require(c, f"data.{name}", 0 <= value < math.inf, "0 or more", value)
    _require(c, "data.pack_tokens", c.data.pack_tokens >= 0, "0 or more", c.data.pack_tokens)
    for name in ("threads", "pad_tokens", "pad_answers"):
        value = getattr(c.data, name)
        _require(c, f"data.{name}", value > 0, "a number above 0", value)
    _require(c, "lora.rank", c.lora.rank >= 0, "0 or more", c.lora.rank)
    _require(c, "lora.alpha", c.lora.alpha >= 0, "0 or more", c.lora.alpha)
    _require(c, "lora.dropout", c.lora.dropout < 1, "less than 1", c.lora.dropout)
    _require(c, "dtype", c.dtype in ("bfloat16", "float32"), "bfloat16 or float32")
    _require(c, "schedule", c.schedule in SCHEDULES, " or ".join(SCHEDULES))
    _require(c, "beta1", 0 <= c.beta1 < 1, "0 <= beta1 < 1")
    _require(c, "beta2", 0 <= c.beta2 < 1, "0 <= beta2 < 1")
    _require(c, "seed", c.seed < 2**32, "less than 2**32")
    _require(c, "decay_rate", 0 < c.decay_rate <= 1, "0 < decay_rate <= 1")
    whole = c.batch_size % c.accumulate == 0
    _require(c, "batch_size", whole, f"a multiple of accumulate ({c.accumulate})")
    template = c.prompt_template
    _require(c, "prompt_template", not template or template.count("{}") == 1, "one {} in it")
    _require(c, "model", bool(c.model) or not model, "a model directory: --config.model=DIR")
    given = bool(c.data.path or c.data.mix)
    _require(
        c, "data.path", given or not data, "a dataset: --config.data.path=FILE_OR_DIR", c.data.path
    )
    _check_datasets(c.data, c.batch_size, c.accumulate)
    needs_epoch = c.schedule == "step" and c.steps_per_epoch == 0
    _require(c, "steps_per_epoch", not needs_epoch, "a number above 0 with schedule=step")
    return c


def _check_datasets(data: DataConfig, batch_size: int, accumulate: int) -> None:
    mix = data.mix
    _require_value("data.mix_by", data.mix_by, data.mix_by in MIXED_BY, " or ".join(MIXED_BY))
    _require_value(
        "data.max_broken", data.max_broken, 0 <= data.max_broken <= 1, "a share from 0 to 1"
    )
    for name, d in mix.items():
        key = f"data.mix.{name}"
        _require_value(
            key, name, re.fullmatch(r"[\w-]+", name) is not None, "a name of letters and digits"
        )
        _require_value(f"{key}.ratio", d.ratio, 0 <= d.ratio < math.inf, "0 or more")
        for field in ("batch_size", "tokens"):
            value = getattr(d, field)
            _require_value(f"{key}.{field}", value, value >= 0, "0 or more")
        one = not (d.batch_size and d.tokens)
        _require_value(f"{key}.tokens", d.tokens, one, "0 with a batch_size, or no batch_size")
        size = d.batch_size or batch_size
        whole = size % accumulate == 0
        _require_value(f"{key}.batch_size", size, whole, f"a multiple of accumulate ({accumulate})")
        own = bool(d.batch_size or d.tokens) and data.mix_by == "example"
        _require_value(f"{key}.batch_size", size, not own, "none of its own with mix_by=example")
        tfds = d.reader == "tfds"
        _require_value(
            f"{key}.dataset", d.dataset, bool(d.dataset) == tfds, "a name, with reader=tfds alone"
        )
        needs = d.ratio > 0 and not d.path and not tfds
        _require_value(f"{key}.path", d.path, not needs, f"its files: --config.{key}.path=...")
    if mix:
        used = any(d.ratio > 0 for d in mix.values())
        _require_value("data.mix", list(mix), used, "a dataset with a ratio above 0")
        _require_value("data.path", data.path, not data.path, "nothing beside data.mix")


def _require(c: TrainConfig, name: str, holds: bool, expected: str, value: Any = None) -> None:
    _require_value(name, getattr(c, name, None) if value is None else value, holds, expected)


def _require_value(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise UserError(f"config.{key} is {value!r}: expected {expected}")
