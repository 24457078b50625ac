"""A configuration as nested plain values, and back: typed as its fields are, unknown names refused."""

import dataclasses
import difflib
import json
import types
from collections.abc import Mapping
from typing import Any

from minigpt4_jax.data.config import DatasetConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_check import check

# What may differ when a run is continued: none of these changes what is computed.
_FREE = {
    "log_every", "eval_every", "eval_examples", "sample_every", "sample_images", "sample_tokens",
    "save_every", "keep", "mesh", "data.workers", "data.threads", "data.timeout", "data.val_path",
    "data.max_broken", "heartbeat_timeout",
}  # fmt: skip


def to_dict(c: TrainConfig) -> dict[str, Any]:
    """Plain values, as config.json holds them."""
    return json.loads(json.dumps(dataclasses.asdict(c)))


def from_mapping(values: Mapping[str, Any] | TrainConfig) -> TrainConfig:
    """A checked configuration from nested values; what is not given keeps its default. UserError
    for an unknown name, with the nearest known, and for a value of the wrong type."""
    if isinstance(values, TrainConfig):
        return check(values)
    return check(build(TrainConfig, values, "config"))


def build(cls: type, values: Any, where: str) -> Any:
    """A dataclass of nested values, not yet checked. where: what messages call it."""
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected named values, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    made: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{where}.{key}"
        if key not in fields:
            raise unknown_key(name.removeprefix("config."))
        default = _default(fields[key])
        if isinstance(default, dict):
            if not isinstance(value, Mapping):
                raise UserError(f"{name} is {value!r}: expected datasets by name")
            made[key] = {n: build(DatasetConfig, v, f"{name}.{n}") for n, v in value.items()}
        elif dataclasses.is_dataclass(default):
            made[key] = build(type(default), value, name)
        else:
            made[key] = _typed(name, value, default)
    return cls(**made)


def _default(f: dataclasses.Field) -> Any:
    made = f.default_factory
    return f.default if made is dataclasses.MISSING else made()


def _typed(name: str, value: Any, default: Any) -> Any:
    """value as the type of the field's default: int for float, list or str for tuple are taken."""
    if isinstance(default, tuple):
        parts = (value,) if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)) and all(isinstance(v, str) for v in parts):
            return tuple(v for v in parts if v)
    elif isinstance(default, float):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is type(default):
        return value
    kind = "texts" if isinstance(default, tuple) else type(default).__name__
    raise UserError(f"{name} is {value!r}: expected {kind} (default {default!r})")


def known_keys() -> list[str]:
    """Every field as the command line spells it, without `--config.`."""
    names = []
    for f in dataclasses.fields(TrainConfig):
        default = _default(f)
        if dataclasses.is_dataclass(default):
            names += [f"{f.name}.{g.name}" for g in dataclasses.fields(default) if g.name != "mix"]
        else:
            names.append(f.name)
    return names


def known_mix_keys(mix: Mapping[str, object]) -> list[str]:
    """The keys of a mixture as the command line spells them, without `--config.`."""
    fields = DatasetConfig.__dataclass_fields__
    return [f"data.mix.{name}.{field}" for name in mix for field in fields]


def unknown_key(key: str, mix: Mapping[str, Any] = types.MappingProxyType({})) -> UserError:
    """The error for a key that no field has, with the nearest that one does. mix: datasets there are."""
    names = known_keys()
    if key.startswith("data.mix."):
        names = known_mix_keys(mix or {key.split(".")[2]: None})
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.7)
    if not near:  # a field of a section, named without the section, or the other way round
        last = key.rsplit(".", 1)[-1]
        short = {n.rsplit(".", 1)[-1]: n for n in names}
        near = [short[n] for n in difflib.get_close_matches(last, list(short), n=1, cutoff=0.4)]
    hint = f"did you mean config.{near[0]}?" if near else f"known are {', '.join(names)}"
    return UserError(f"config.{key} is not a configuration key; {hint}")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Fields of two `to_dict` results that differ in what is computed: 'key: old -> new'."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in values.items():
            nested = isinstance(value, Mapping)
            out |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
        return out

    defaults = flat(to_dict(TrainConfig()))  # for fields that are younger than the run
    a, b = defaults | flat(old), defaults | flat(new)
    keys = sorted((a.keys() | b.keys()) - _FREE)
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]
