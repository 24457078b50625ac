"""Read a configuration from a config file and the command line.

A config file is Python with `get_config(arg="")` that returns an `ml_collections.ConfigDict`. It sets
what differs from the defaults of training.config.
"""

import dataclasses
import difflib
import re
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4_jax.errors import UserError, expand_home
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_check import check
from minigpt4_jax.training.config_values import build, known_keys, known_mix_keys, unknown_key


def configs_dir() -> Path:
    """The folder of shipped configurations, next to the package in a clone and when installed."""
    return Path(__file__).resolve().parents[2] / "configs"


def known_configs() -> list[str]:
    """Names of the shipped configurations."""
    return sorted(p.stem for p in configs_dir().glob("*.py") if not p.stem.startswith("_"))


def find_config(name: str) -> Path:
    """The file of a shipped name or of a path ending in .py. UserError lists the shipped names."""
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
    """NAME, PATH.py, NAME:ARG or PATH.py:ARG -> the result of get_config(ARG) as plain values.

    UserError: an unknown name, an exception in the file (with its line), a result of another type.
    """
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
        frames = traceback.extract_tb(e.__traceback__)
        line = next(
            (f.lineno for f in reversed(frames) if f.filename == str(path)), frames[-1].lineno
        )
        raise UserError(
            f"--config={spec}: {path}, line {line}: {type(e).__name__}: {' '.join(str(e).split())}"
        ) from e
    plain = values.to_dict() if hasattr(values, "to_dict") else values
    if not isinstance(plain, dict):
        raise UserError(f"--config={spec}: get_config() returned {plain!r}; expected a ConfigDict")
    return plain


def parse(
    args: Sequence[str], *, data_only: bool = False, sizes_only: bool = False
) -> tuple[TrainConfig, str]:
    """`--config=NAME[:ARG] --workdir=DIR [--config.KEY=VALUE]...` -> (configuration, workdir).

    data_only: no model and no workdir are needed. sizes_only: no dataset either.

    Overrides are parsed by ml_collections.config_flags: values have the type of the field,
    `--config.flag` and `--noconfig.flag` set a boolean, a repeated flag adds a path.
    UserError: an unknown argument or key, a value of the wrong type or out of range.
    """
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    spec, arguments = split_config_argument(args)
    new_flag_values: Any = flags.FlagValues  # absl has no annotations
    flag_values = new_flag_values()
    flags.DEFINE_string("workdir", "", "directory of the run", flag_values=flag_values)
    base = build(TrainConfig, read_config_file(spec), "config")
    defaults = ConfigDict(dataclasses.asdict(base))
    for arg in arguments:
        _check_override(arg, base.data.mix)
    argv = ["train", *(_quote_tuple(arg, defaults) for arg in arguments)]
    holder = config_flags.DEFINE_config_dict(
        "config", defaults, flag_values=flag_values, sys_argv=argv
    )
    try:
        positional = flag_values(argv)[1:]
    except (flags.Error, ValueError, TypeError) as e:
        raise UserError(_flag_error(e, base)) from None
    if positional:
        raise UserError(
            f"unexpected argument {positional[0]!r}: options look like --config.steps=100"
        )
    if not flag_values.workdir and not (data_only or sizes_only):
        raise UserError("--workdir is missing: name a directory for the run")
    config = build(TrainConfig, holder.value.to_dict(), "config")
    check(config, model=not (data_only or sizes_only), data=not sizes_only)
    return config, flag_values.workdir


def split_config_argument(args: Sequence[str]) -> tuple[str, list[str]]:
    """-> (value of --config, all other arguments). UserError: --config is missing."""
    spec, rest = "", []
    it = iter(map(expand_home, args))
    for arg in it:
        name, eq, value = arg.partition("=")
        if name in ("--config", "-config"):
            spec = value if eq else next(it, "")
        else:
            rest.append(arg)
    if not spec:
        raise UserError(f"--config is missing: one of {', '.join(known_configs())}, or a path")
    return spec, rest


def _override_key(arg: str) -> str | None:
    """The key of `--config.KEY=...` or `--noconfig.KEY`; None for any other argument."""
    name = arg.partition("=")[0].lstrip("-") if arg.startswith("-") else ""
    name = name.removeprefix("no") if name.startswith("noconfig.") else name
    return name.removeprefix("config.") if name.startswith("config.") else None


def _check_override(arg: str, mix: Mapping[str, Any]) -> None:
    key = _override_key(arg)
    if key is not None and key not in known_keys() + known_mix_keys(mix):
        raise unknown_key(key, mix)


def _quote_tuple(arg: str, defaults: Any) -> str:
    """Rewrite `--config.PATHS=a,b` as the Python tuple that ml_collections expects."""
    key, (name, eq, text) = _override_key(arg), arg.partition("=")
    if key is None or not eq or text[:1] in ("(", "["):
        return arg
    default: Any = defaults
    for part in key.split("."):
        default = default[part]
    if not isinstance(default, tuple):
        return arg
    items = [text] if key.endswith(".prompts") else text.split(",")
    return f"{name}={tuple(items)!r}"


def _flag_error(e: Exception, base: TrainConfig) -> str:
    """An absl error as one line that states the field's type and default."""
    text = " ".join(str(e).split())
    if unknown := re.match(r"Unknown command line flag '(.+?)'", text):
        name = unknown[1]
        hint = f"did you mean --config.{name}?"
        if name not in known_keys():
            hint = str(unknown_key(name)).partition("; ")[2]
        return f"--{name} is not an option: keys are written --config.KEY=VALUE; {hint}"
    if not text.startswith("flag --"):
        return text
    name, _, value = text.removeprefix("flag --").partition(": ")[0].partition("=")
    key = name.removeprefix("config.")
    default: Any = dataclasses.asdict(base)
    for part in key.split("."):
        default = default[part]
    return f"{name} is {value!r}: expected {type(default).__name__} (default {default!r})"
