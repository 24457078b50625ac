"""The configuration of a training run: its fields, and how a file and the command line fill them.

A config file is Python with `get_config(arg="")` that returns an `ml_collections.ConfigDict`. It
names what it changes; everything else keeps the default written here.
"""

import dataclasses
import difflib
import json
import math
import traceback
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.training import datasets
from minigpt4_jax.training.datasets import DatasetConfig


@dataclass(frozen=True)
class DataConfig:
    """What is read. A path is a .json, a .jsonl, or a folder with filter_cap.json and image/."""

    path: tuple[str, ...] = ()
    mix: Mapping[str, DatasetConfig] = field(default_factory=dict)  # instead: datasets by name
    mix_by: str = "step"  # draw a dataset for each batch, or "example": for each row of one
    root: str = ""  # folder that the relative paths of mix begin at
    max_broken: float = 0.01  # share of rows that may be left out, broken; 0: the first is an error
    val_path: tuple[str, ...] = ()  # held-out data for the validation loss and the samples
    prompts: tuple[str, ...] = ()  # one a batch, for rows without a question; (): bare image
    clean_captions: bool = False  # the original's stage 1: lower case, no punctuation, 50 words
    shuffle: bool = True  # anew each epoch; False: in the order of the file, easy ones first say
    crop: bool = False  # random resized crop, as version 1 was trained first; moves what boxes name
    workers: int = 0  # processes that decode images; 0: threads of this one
    threads: int = 2  # in each of them
    timeout: float = 600.0  # seconds without a batch until they count as hung; 0: wait for ever
    pad_tokens: int = 32  # rows are padded to multiples of these, so that few programs are compiled
    pad_answers: int = 16
    pack_tokens: int = 0  # several short examples in a row of so many tokens; 0: a row for each


@dataclass(frozen=True)
class LoraChoice:
    """Adapters on the language model. A value that is left as it is here is the model's own; a
    model without adapters gets new ones when the rank is given."""

    rank: int = 0
    alpha: float = 0.0  # of new ones: 16
    targets: tuple[str, ...] = ()  # of new ones: q, v; some of q, k, v, o, gate, up, down
    dropout: float = -1.0  # on their input, in training; of new ones: 0.05


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on, besides its data's content and its model's weights."""

    model: str = ""  # model directory, made by `python -m convert build` or by an earlier run
    variant: str = ""  # refuse a model of another variant; "": any
    llm_width: int = 0  # refuse a language model of another width; 0: any
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraChoice = field(default_factory=LoraChoice)
    prompt_template: str = ""  # around a row's question, {} in its place; "": the model's own
    end_symbol: str = ""  # closes every answer; "": the model's own
    max_text_length: int = 0  # tokens an answer may have; 0: the model's own

    freeze_vit: bool = True
    freeze_qformer: bool = True
    dtype: str = "bfloat16"  # of frozen matrices and their products; "float32" for exactness
    # devices: sizes of data, fsdp and model, as data:2,fsdp:4; "" or "auto": chosen and told
    mesh: str = ""
    remat: bool = False  # recompute activations in the backward pass: less memory, more time

    steps: int = 1000
    batch_size: int = 12
    accumulate: int = 1  # micro-batches a step
    seed: int = 42  # the original's; order of the data, prompts, dropout

    schedule: str = "cosine"  # or "step"
    init_lr: float = 3e-5
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_steps: int = 200
    steps_per_epoch: int = 0  # only the step schedule, and a warmup over several epochs, ask for it
    decay_rate: float = 1.0  # of the step schedule
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 0.0  # largest global norm of the gradient; 0: no clipping, as the original

    log_every: int = 10
    eval_every: int = 200  # validation loss; 0: never
    eval_examples: int = 200  # at most so many of the validation rows
    sample_every: int = 200  # caption a few validation images into the log; 0: never
    sample_images: int = 4
    sample_tokens: int = 60
    save_every: int = 100  # checkpoint
    keep: int = 3  # checkpoints on disk
    # of several processes: seconds without a sign of one until the others end, as it is gone
    heartbeat_timeout: float = 100.0


# Those of minigpt4_jax.optim, which is not imported here: it would bring JAX with it.
SCHEDULES = ("cosine", "step")

# What may differ when a run is continued: none of these changes what is computed.
_FREE = {
    "log_every", "eval_every", "eval_examples", "sample_every", "sample_images", "sample_tokens",
    "save_every", "keep", "mesh", "data.workers", "data.threads", "data.timeout", "data.val_path",
    "data.max_broken", "heartbeat_timeout",
}  # fmt: skip


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
    datasets.check(c.data, c.batch_size, c.accumulate)
    needs_epoch = c.schedule == "step" and c.steps_per_epoch == 0
    _require(c, "steps_per_epoch", not needs_epoch, "a number above 0 with schedule=step")
    return c


def _require(c: TrainConfig, name: str, holds: bool, expected: str, value: Any = None) -> None:
    if not holds:
        value = getattr(c, name) if value is None else value
        raise UserError(f"config.{name} is {value!r}: expected {expected}")


# --- values ---------------------------------------------------------------------------------


def to_dict(c: TrainConfig) -> dict[str, Any]:
    """Plain values, as config.json holds them."""
    return json.loads(json.dumps(dataclasses.asdict(c)))


def from_mapping(values: Mapping[str, Any] | TrainConfig) -> TrainConfig:
    """A checked configuration from nested values; what is not given keeps its default. UserError
    for an unknown name, with the nearest known, and for a value of the wrong type."""
    if isinstance(values, TrainConfig):
        return check(values)
    return check(_build(TrainConfig, values, "config"))


def _build(cls: type, values: Any, where: str) -> Any:
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
            made[key] = {n: _build(DatasetConfig, v, f"{name}.{n}") for n, v in value.items()}
        elif dataclasses.is_dataclass(default):
            made[key] = _build(type(default), value, name)
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


def unknown_key(key: str, mix: Mapping[str, Any] = types.MappingProxyType({})) -> UserError:
    """The error for a key that no field has, with the nearest that one does. mix: datasets there are."""
    names = known_keys()
    if key.startswith("data.mix."):
        names = datasets.known_keys(mix or {key.split(".")[2]: None})
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


# --- files ----------------------------------------------------------------------------------


def configs_dir() -> Path:
    """The folder of shipped configurations: beside the package, in a clone and installed."""
    return Path(__file__).resolve().parents[2] / "configs"


def known_configs() -> list[str]:
    return sorted(p.stem for p in configs_dir().glob("*.py") if not p.stem.startswith("_"))


def find_config(name: str) -> Path:
    """The file of a config: a shipped name, or a path ending in .py. UserError lists the known."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise UserError(f"--config={name}: there is no such file")
        return Path(name)
    path = configs_dir() / f"{name}.py"
    if name not in known_configs():
        near = difflib.get_close_matches(name, known_configs(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--config={name}: unknown; {hint}known are {', '.join(known_configs())}, "
            "or give the path of a .py file"
        )
    return path


def read_config_file(spec: str) -> dict[str, Any]:
    """NAME, PATH.py, NAME:ARG or PATH.py:ARG -> what its get_config(ARG) returns, plain."""
    name, _, arg = spec.partition(":")
    path = find_config(name)
    module = types.ModuleType(f"config_{path.stem}")
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        values = module.get_config(arg) if arg else module.get_config()
    except UserError:
        raise
    except Exception as e:
        at = traceback.extract_tb(e.__traceback__)[-1].lineno
        raise UserError(
            f"--config={spec}: {path}, line {at}: {type(e).__name__}: {' '.join(str(e).split())}"
        ) from e
    plain = values.to_dict() if hasattr(values, "to_dict") else values
    if not isinstance(plain, dict):
        raise UserError(f"--config={spec}: get_config() returned {plain!r}; expected a ConfigDict")
    return plain


# --- the command line -----------------------------------------------------------------------


def parse(
    args: Sequence[str], *, data_only: bool = False, sizes_only: bool = False
) -> tuple[TrainConfig, str]:
    """`--config=NAME[:ARG] --workdir=DIR [--config.KEY=VALUE]...` -> (configuration, workdir).

    data_only: the configuration is wanted for its data; no model and no workdir are needed.
    sizes_only: nor is data.

    Flags are absl's and overrides those of ml_collections.config_flags: typed as the field is,
    `--config.flag` and `--noconfig.flag` for a boolean, a repeated flag for several paths.
    """
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    spec, overrides = _take_config(args)
    flag_values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "where the run is kept", flag_values=flag_values)
    base = _build(TrainConfig, read_config_file(spec), "config")
    values = ConfigDict(_with_tuples(base))
    for arg in overrides:
        _check_override(arg, base.data.mix)
    overrides = [_quoted(arg, values) for arg in overrides]
    argv = ["train", *overrides]
    holder = config_flags.DEFINE_config_dict(
        "config", values, flag_values=flag_values, sys_argv=argv
    )
    try:
        rest = flag_values(argv)[1:]
    except (flags.Error, ValueError, TypeError) as e:
        raise UserError(_flag_error(e, base)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: options look like --config.steps=100")
    if not flag_values.workdir and not (data_only or sizes_only):
        raise UserError("--workdir is missing: name a directory to keep the run in")
    values = _build(TrainConfig, holder.value.to_dict(), "config")
    return (
        check(values, model=not (data_only or sizes_only), data=not sizes_only),
        flag_values.workdir,
    )


def _take_config(args: Sequence[str]) -> tuple[str, list[str]]:
    """Split the value of --config from everything else."""
    spec, rest = "", []
    it = iter(args)
    for arg in it:
        name, eq, value = arg.partition("=")
        if name in ("--config", "-config"):
            spec = value if eq else next(it, "")
        else:
            rest.append(arg)
    if not spec:
        raise UserError(f"--config is missing: one of {', '.join(known_configs())}, or a path")
    return spec, rest


def _with_tuples(c: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(c)


def _override_key(arg: str) -> str | None:
    """The key of `--config.KEY=...` or `--noconfig.KEY`; None for any other argument."""
    name = arg.partition("=")[0].lstrip("-") if arg.startswith("-") else ""
    name = name.removeprefix("no") if name.startswith("noconfig.") else name
    return name.removeprefix("config.") if name.startswith("config.") else None


def _check_override(arg: str, mix: Mapping[str, Any]) -> None:
    key = _override_key(arg)
    if key is not None and key not in known_keys() + datasets.known_keys(mix):
        raise unknown_key(key, mix)


def _quoted(arg: str, values: Any) -> str:
    """Paths reach ml_collections' tuple parser as the Python text it expects; commas separate."""
    key, (name, eq, text) = _override_key(arg), arg.partition("=")
    if key is None or not eq or text[:1] in ("(", "["):
        return arg
    value: Any = values
    for part in key.split("."):
        value = value[part]
    if not isinstance(value, tuple):
        return arg
    parts = [text] if key.endswith(".prompts") else text.split(",")
    return f"{name}={tuple(parts)!r}"


def _flag_error(e: Exception, base: TrainConfig) -> str:
    """One line from an absl error, with the type the field has."""
    text = " ".join(str(e).split())
    if not text.startswith("flag --"):
        return text
    name, _, value = text.removeprefix("flag --").partition(": ")[0].partition("=")
    key = name.removeprefix("config.")
    default: Any = dataclasses.asdict(base)
    for part in key.split("."):
        default = default[part]
    return f"{name} is {value!r}: expected {type(default).__name__} (default {default!r})"
