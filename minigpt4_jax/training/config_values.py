"""Convert a configuration to nested plain values and back, with types and names checked."""

import dataclasses
import difflib
import json
import os
import types
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from minigpt4_jax.data.config import DatasetConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_check import check

T = TypeVar("T")

_PATHS = ("path", "val_path", "root", "images")  # last words of keys with local paths

# What other programs call a key.
SYNONYMS = {
    "init_lr": ("learning_rate", "lr", "base_lr", "max_lr", "peak_lr"),
    "steps": ("epochs", "epoch", "num_epochs", "max_epochs", "max_epoch", "num_train_epochs", "max_steps",
              "num_steps", "total_steps", "train_steps", "max_train_steps", "iterations"),
    "warmup_steps": ("warmup", "num_warmup_steps", "warmup_iters", "warmup_ratio"),
    "schedule": ("scheduler", "lr_scheduler", "lr_scheduler_type", "lr_schedule"),
    "batch_size": ("batch", "train_batch_size", "per_device_train_batch_size", "global_batch_size"),
    "accumulate": ("gradient_accumulation_steps", "gradient_accumulation", "accum_grad_iters"),
    "clip": ("max_grad_norm", "grad_clip", "gradient_clip_val", "clip_norm"),
    "remat": ("gradient_checkpointing", "use_grad_checkpoint"),
    "dtype": ("precision", "mixed_precision", "fp16", "bf16", "amp"),
    "log_every": ("logging_steps",), "save_every": ("save_steps",), "eval_every": ("eval_steps",),
    "keep": ("save_total_limit",), "max_text_length": ("max_length", "max_seq_length", "max_txt_len"),
    "data.path": ("data_path", "train_file", "dataset"), "data.val_path": ("eval_file", "validation_file"),
    "data.workers": ("num_workers", "dataloader_num_workers"), "lora.rank": ("lora_r", "lora_rank"),
    "lora.alpha": ("lora_alpha",), "lora.dropout": ("lora_dropout",),
}  # fmt: skip

# What other programs have as a key
NO_KEYS = {
    "output_dir": "--workdir=DIR names the run's directory",
    "resume": "a run continues where its command is repeated with the same --workdir",
    "resume_from_checkpoint": "a run continues where its command is repeated with the same --workdir",
    "optimizer": "the optimizer is AdamW; config.beta2, config.eps and config.weight_decay are its options",
}

# Keys that may change when a run is resumed, with the reason; all others would make it another run.
CHANGEABLE = {
    "model": "may have been moved: its weights are compared (see training.workdir)",
    "steps": "may grow: the run is extended (see training.workdir)",
    "mesh": "where arrays lie, not their values",
    "log_every": "only what is printed",
    "eval_every": "only what is logged",
    "eval_examples": "only what is logged",
    "sample_every": "only what is logged",
    "sample_images": "only what is logged",
    "sample_tokens": "only what is logged",
    "eval.benchmarks": "only what is logged",
    "eval.root": "only what is logged",
    "eval.splits": "only what is logged",
    "eval.every": "only what is logged",
    "eval.limit": "only what is logged",
    "eval.batch_size": "only what is logged",
    "eval.best": "only which model is kept besides the last",
    "save_every": "only how much is repeated after an interruption",
    "keep": "only disk space",
    "heartbeat_timeout": "only when a lost process is noticed",
    "data.workers": "only how fast batches are made",
    "data.threads": "only how fast batches are made",
    "data.timeout": "only when hung workers are noticed",
    "data.val_path": "only what is logged",
    "data.max_broken": "only when unreadable rows end the run",
}


def to_dict(c: TrainConfig) -> dict[str, Any]:
    """Plain values, as in config.json."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(c)))
    return values


def from_mapping(values: Mapping[str, Any] | TrainConfig) -> TrainConfig:
    """A checked configuration from nested values; missing ones keep their default.

    UserError: an unknown name (with the nearest known one), a value of the wrong type or out of range.
    """
    if isinstance(values, TrainConfig):
        return check(values)
    return check(build(TrainConfig, values, "config"))


def build(cls: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass cls from nested values; value ranges are not checked.
    where: its name in error messages."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected named values, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}.{key}"
        if key not in fields:
            raise unknown_key(name.removeprefix("config."))
        default = _default(fields[key])
        if isinstance(default, dict):
            if not isinstance(value, Mapping):
                raise UserError(f"{name} is {value!r}: expected datasets by name")
            arguments[key] = {n: build(DatasetConfig, v, f"{name}.{n}") for n, v in value.items()}
        elif dataclasses.is_dataclass(default):
            arguments[key] = build(cast(type[Any], type(default)), value, name)
        else:
            arguments[key] = _typed(name, value, default)
    return cls(**arguments)


def _default(f: dataclasses.Field[Any]) -> Any:
    factory = f.default_factory
    return f.default if factory is dataclasses.MISSING else factory()


def _typed(name: str, value: Any, default: Any) -> Any:
    """value with the type of the field's default; int becomes float, list and str become tuple."""
    if isinstance(default, tuple):
        items = (value,) if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(v, str) for v in items):
            return tuple(v for v in items if v)
    elif isinstance(default, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is type(default):
        return value
    expected = "strings" if isinstance(default, tuple) else type(default).__name__
    raise UserError(f"{name} is {value!r}: expected {expected} (default {default!r})")


def known_keys() -> list[str]:
    """Every field as spelled on the command line, without `--config.`."""
    names = []
    for f in dataclasses.fields(TrainConfig):
        default = _default(f)
        if dataclasses.is_dataclass(default):
            names += [f"{f.name}.{g.name}" for g in dataclasses.fields(default) if g.name != "mix"]
        else:
            names.append(f.name)
    return names


def known_mix_keys(mix: Mapping[str, object]) -> list[str]:
    """The keys of a mixture's datasets as spelled on the command line, without `--config.`."""
    fields = DatasetConfig.__dataclass_fields__
    return [f"data.mix.{name}.{field}" for name in mix for field in fields]


def unknown_key(key: str, mix: Mapping[str, Any] = types.MappingProxyType({})) -> UserError:
    """The error for a key that is no field, with the nearest field. mix: the datasets by name."""
    names = known_keys()
    if key.startswith("data.mix."):
        names = known_mix_keys(mix or {key.split(".")[2]: None})
    by_synonym = {synonym: name for name, synonyms in SYNONYMS.items() for synonym in synonyms}
    synonym = by_synonym.get(key.rsplit(".", 1)[-1].lower())
    if (last := key.rsplit(".", 1)[-1]) in NO_KEYS:
        return UserError(f"config.{key} is not a configuration key; {NO_KEYS[last]}")
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    if not near:  # another spelling of a synonym
        close = difflib.get_close_matches(last, by_synonym, n=1, cutoff=0.8)
        synonym = synonym or next((by_synonym[name] for name in close), None)
    if synonym in names:
        near = [synonym]
    elif last in names:  # the right name in a section
        near = [last]
    if not near:  # perhaps the right field in the wrong section
        field = key.rsplit(".", 1)[-1]
        by_field = {n.rsplit(".", 1)[-1]: n for n in names}
        close = difflib.get_close_matches(field, list(by_field), n=1, cutoff=0.6)
        near = [by_field[n] for n in close]
    hint = f"did you mean config.{near[0]}?" if near else f"known are {', '.join(names)}"
    return UserError(f"config.{key} is not a configuration key; {hint}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields of two `to_dict` results that differ and must not when a run is resumed: 'key: old -> new'."""
    changes = _changes(old, new)
    refused = [f"{key}: {a!r} -> {b!r}" for key, (a, b) in changes.items() if key not in CHANGEABLE]
    if "steps" in changes and changes["steps"][1] < changes["steps"][0]:
        a, b = changes["steps"]
        refused.append(f"steps: {a} -> {b}, which may only grow")
    return sorted(refused)


def allowed_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields of two `to_dict` results that differ and may, except steps: 'key: old -> new'."""
    return [
        f"{key}: {a!r} -> {b!r}"
        for key, (a, b) in _changes(old, new).items()
        if key in CHANGEABLE and key != "steps"
    ]


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old, new) of each field that differs, sorted by key."""
    # for fields added after the old run; such a run goes on without `data.exif` (keep_old_defaults)
    defaults = _flatten(to_dict(TrainConfig())) | {"data.exif": False}
    a, b = defaults | _flatten(old), defaults | _flatten(new)
    keys = sorted(a.keys() | b.keys())
    pairs = {k: (a.get(k), b.get(k)) for k in keys}
    return {k: (x, y) for k, (x, y) in pairs.items() if _resolved(k, x) != _resolved(k, y)}


def _resolved(key: str, value: Any) -> Any:
    """A value to be compared: the same file may be written as data/a.json, ./data/a.json or in full."""
    if key.rsplit(".", 1)[-1] not in _PATHS:
        return value
    if isinstance(value, list):
        return [_resolved(key, item) for item in value]
    return os.path.abspath(value) if isinstance(value, str) and "://" not in value else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"path": ...}} -> {"data.path": ...}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= _flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat
