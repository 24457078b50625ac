"""From a file of settings and the command line to a configuration.

A config file is Python with `get_config(arg="")` that returns an `ml_collections.ConfigDict`. It
names what it changes; everything else keeps the default of training.config.
"""

import dataclasses
import difflib
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_check import check
from minigpt4_jax.training.config_values import build, known_keys, known_mix_keys, unknown_key


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

    spec, overrides = take_config(args)
    flag_values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "where the run is kept", flag_values=flag_values)
    base = build(TrainConfig, read_config_file(spec), "config")
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
    values = build(TrainConfig, holder.value.to_dict(), "config")
    return (
        check(values, model=not (data_only or sizes_only), data=not sizes_only),
        flag_values.workdir,
    )


def take_config(args: Sequence[str]) -> tuple[str, list[str]]:
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
    if key is not None and key not in known_keys() + known_mix_keys(mix):
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
