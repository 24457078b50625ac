"""What the commands with --ray have in common: options, the connection, what a model needs of a machine."""

import argparse
import contextlib
import importlib
import logging
import math
import os
import re
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple

from minigpt4_jax.errors import UserError

OPTIONS = ("ray", "ray_models", "ray_gpus", "ray_cpus", "ray_resources")
# Environment variables that processes on other machines get too; none of them may be a secret.
_PASSED = re.compile(r"(JAX|XLA|TPU|NCCL)_\w+|MINIGPT4_JAX_CACHE")

_CONNECT_SECONDS = 10.0
_NO_CLUSTER = "there is no Ray cluster ({}); start one with `ray start --head`, or use --ray=local"


def add_options(group: Any) -> None:
    """Add OPTIONS to an argparse group."""
    group.add_argument("--ray", nargs="?", const="", metavar="ADDRESS",
                       help="run on this Ray cluster, HOST:PORT; `local` starts one on this machine; without "
                       "a value the cluster that this machine belongs to, or else a local one")  # fmt: skip
    group.add_argument("--ray-models", metavar="N|MIN:MAX",
                       help="copies of the model; by default as many as fit into the cluster")  # fmt: skip
    group.add_argument("--ray-gpus", type=float, metavar="N",
                       help="GPUs of a model; by default those of --mesh, or 1; 0 without any")  # fmt: skip
    group.add_argument("--ray-cpus", type=float, metavar="N",
                       help="CPUs of a model; by default 1 with GPUs, else all of a machine")  # fmt: skip
    group.add_argument("--ray-resources", action="append", metavar="NAME:N",
                       help="other resources of a model, as TPU:4; may be repeated")  # fmt: skip


def check_options(args: argparse.Namespace) -> None:
    """UserError: options without --ray, or out of range."""
    if args.ray is None:
        for name in OPTIONS[1:]:
            if getattr(args, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is of --ray; add it, or omit this")
        return
    for name in ("ray_gpus", "ray_cpus"):
        value = getattr(args, name)
        if value is not None and not value >= 0:
            raise UserError(f"--{name.replace('_', '-')}={value}: expected 0 or more")
    parse_models(args.ray_models)
    _parse_resources(args.ray_resources)
    _check_address(args.ray)


def parse_models(text: str | None) -> tuple[int, int] | None:
    """ "4" -> (4, 4), "1:4" -> (1, 4). UserError: neither."""
    if text is None:
        return None
    low, _, high = text.partition(":")
    if low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low):
        return int(low), int(high or low)
    raise UserError(f"--ray-models={text}: expected N or MIN:MAX, from 1 on")


def _parse_resources(texts: list[str] | None) -> dict[str, float]:
    found = {}
    for text in texts or []:
        name, _, amount = text.partition(":")
        if not name or not re.fullmatch(r"\d+(\.\d+)?", amount):
            raise UserError(f"--ray-resources={text}: expected NAME:N, as TPU:4")
        found[name] = float(amount)
    return found


def _check_address(address: str) -> None:
    """UserError: nothing listens there; Ray itself would wait for minutes."""
    if address in ("", "local", "auto"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal():
        raise UserError(f"--ray={address}: expected HOST:PORT, as 10.0.0.2:6379, or local")
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as e:
        raise UserError(f"--ray={address}: {_NO_CLUSTER.format(e)}") from None


# --- the cluster ----------------------------------------------------------------------------------


def require(*libraries: str) -> None:
    """UserError: Ray, or what its libraries (`data`, `serve`) need, is not installed."""
    for name in ("ray", *(f"ray.{library}" for library in libraries)):
        try:
            importlib.import_module(name)
        except ImportError as e:
            raise UserError(
                f"--ray needs the package {e.name}: pip install 'minigpt4_jax[ray]'"
            ) from None


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the cluster at an address, of --ray; a connection that exists is kept.

    UserError: there is none.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address or None, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"--ray={address}: {_NO_CLUSTER.format(reason)}") from None
    try:
        yield
    finally:
        ray.shutdown()


def runtime_env() -> dict[str, Any]:
    """Settings of JAX, and the folder of compiled programs, for processes on other machines."""
    passed = {name: value for name, value in os.environ.items() if _PASSED.fullmatch(name)}
    return {"env_vars": passed}


# --- resources ------------------------------------------------------------------------------------


class Needs(NamedTuple):
    """What one model needs of one machine."""

    cpus: float
    gpus: float
    resources: dict[str, float]

    def options(self) -> dict[str, Any]:
        """As Ray's options of an actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus, "resources": self.resources}

    def fit(self, machine: dict[str, float]) -> int:
        """How many models find a place on a machine with these resources."""
        needed = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return int(min((machine.get(name, 0) // n for name, n in needed.items() if n), default=1))


def _machines() -> list[dict[str, float]]:
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def num_machines() -> int:
    """Of the cluster that this process is connected to."""
    return len(_machines())


def model_needs(args: argparse.Namespace) -> Needs:
    """From the command line, or as fits the machines of the cluster."""
    machines = _machines()
    most_gpus = max(machine.get("GPU", 0) for machine in machines)
    resources = _parse_resources(args.ray_resources)
    gpus = args.ray_gpus
    if gpus is None:
        sizes = [int(n) for n in re.findall(r":(\d+)", args.mesh or "")]
        whole_machine = args.mesh is not None and (args.mesh == "auto" or "-1" in args.mesh)
        gpus = most_gpus if whole_machine else math.prod(sizes)
        if not most_gpus or "TPU" in resources:
            gpus = 0
    cpus = args.ray_cpus
    if cpus is None:
        some = [machine["CPU"] for machine in machines if machine.get("CPU")]
        cpus = 1 if gpus or resources else min(some, default=1)
    return Needs(cpus, gpus, resources)


def num_models(args: argparse.Namespace, needs: Needs) -> tuple[int, int]:
    """The least and the greatest number of models. UserError: no machine has room for one."""
    given = parse_models(args.ray_models)
    if given is not None:
        return given
    room = sum(map(needs.fit, _machines()))
    if not room:
        raise UserError(
            f"no machine of the Ray cluster has {needs.cpus:g} CPUs, {needs.gpus:g} GPUs"
            + "".join(f", {amount:g} {name}" for name, amount in needs.resources.items())
            + " for a model (--ray-cpus, --ray-gpus, --ray-resources); for a cluster that grows when it is "
            "needed, say how many with --ray-models=MIN:MAX"
        )
    return room, room
