"""Train a model's projection: `python -m minigpt4_jax.train --config=stage2 --workdir=DIR ...`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minigpt4_jax import errors, joining
from minigpt4_jax.paths import any_path
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_files import known_configs, parse
from minigpt4_jax.training.config_values import known_keys, to_dict

if TYPE_CHECKING:
    from minigpt4_jax.training.loop import Result

USAGE = """\
usage: python -m minigpt4_jax.train --config=NAME[:ARG] --workdir=DIR [--config.KEY=VALUE]...

  --config      {known}, or the path of a .py file with get_config()
  --workdir     where checkpoints, logs and the trained model go; a run begun there is continued
  --config.KEY  changes a value, for instance --config.batch_size=4 --config.data.path=my.jsonl

On several hosts the same command runs on each:

{joining}

A model directory (--config.model) comes from `python -m convert build`. The keys:
"""


def train(config: Any, workdir: Any, **options: Any) -> "Result":
    """Run a training as described in `minigpt4_jax.training.loop.train`."""
    from minigpt4_jax.training import loop  # imports JAX

    return loop.train(config, workdir, **options)


def main(args: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    others, args = joining.take_options(args)
    if not args or {"-h", "--help", "-help"} & set(args):
        print(USAGE.format(known=", ".join(known_configs()), joining=joining.USAGE) + _keys())
        return 0 if args else 2
    config, workdir = parse(args)
    if joining.are_several(others):
        all_came = joining.watched(others, lambda: _kept(workdir))
        # imported now: from joining on until the run listens, JAX swallows a SIGTERM
        from minigpt4_jax.training import loop  # noqa: F401

        joining.join(others, config.heartbeat_timeout)
        all_came()
    train(config, workdir)
    return 0


def _kept(workdir: str) -> str:
    from minigpt4_jax.training import run  # imports JAX

    return run.kept(any_path("workdir", workdir))


def _keys() -> str:
    values = to_dict(TrainConfig())
    lines = []
    for key in known_keys():
        value: Any = values
        for part in key.split("."):
            value = value[part]
        lines.append(f"  {key} = {value!r}")
    return "\n".join(lines)


if __name__ == "__main__":
    errors.run(main, joining.leave)
