"""Training: `python -m minigpt4_jax.train --config=stage2 --workdir=DIR ...`."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from minigpt4_jax import errors
from minigpt4_jax.parallel import distributed, supervisor
from minigpt4_jax.storage.paths import parse_path
from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_cli import known_configs, parse
from minigpt4_jax.training.config_values import known_keys, to_dict

if TYPE_CHECKING:
    from minigpt4_jax.training.trainer import TrainResult

USAGE = """\
usage: python -m minigpt4_jax.train --config=NAME[:ARG] --workdir=DIR [--config.KEY=VALUE]...

  --config      {known}, or the path of a .py file with get_config()
  --workdir     directory for checkpoints, logs and the trained model; a run started there continues
  --config.KEY  overrides a value, for instance --config.batch_size=4 --config.data.path=my.jsonl

On several hosts, run the same command on each:

{distributed}

A model directory (--config.model) comes from `python -m convert build`. The keys:
"""


def train(config: Any, workdir: Any, **options: Any) -> "TrainResult":
    """Train a model, as `minigpt4_jax.training.trainer.train` describes."""
    from minigpt4_jax.training import trainer  # imports JAX

    return trainer.train(config, workdir, **options)


def main(args: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    process_options, args = distributed.parse_process_options(args)
    if not args or {"-h", "--help", "-help"} & set(args):
        print(
            USAGE.format(known=", ".join(known_configs()), distributed=distributed.USAGE) + _keys()
        )
        return 0 if args else 2
    config, workdir = parse(args)
    if distributed.is_distributed(process_options):
        on_connected = supervisor.supervise(process_options, lambda: _describe_saved_state(workdir))
        # Imported now: between initialize() and the run's own handlers, JAX swallows a SIGTERM.
        from minigpt4_jax.training import trainer  # noqa: F401

        distributed.initialize(process_options, config.heartbeat_timeout)
        on_connected()
    train(config, workdir)
    return 0


def _describe_saved_state(workdir: str) -> str:
    from minigpt4_jax.training.workdir import describe_saved_state  # imports JAX

    return describe_saved_state(parse_path("workdir", workdir))


def _keys() -> str:
    """All configuration keys with their defaults, one a line."""
    values = to_dict(TrainConfig())
    lines = []
    for key in known_keys():
        value: Any = values
        for part in key.split("."):
            value = value[part]
        lines.append(f"  {key} = {value!r}")
    return "\n".join(lines)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv), supervisor.exit_process)
