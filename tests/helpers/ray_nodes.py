"""A Ray cluster of several nodes on this machine."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

# A killed node, which refuses connections, counts as lost after four seconds; a slow one may take its time.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000,
          "health_check_failure_threshold": 4, "health_check_timeout_ms": 20000}  # fmt: skip
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@contextlib.contextmanager
def head() -> Iterator[Cluster]:
    """A cluster of one node with one CPU, this process connected to it; `add_node` adds others."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    arguments = {"include_dashboard": False, "_system_config": HEALTH, **NODE}
    handler = signal.getsignal(signal.SIGTERM)  # Ray installs its own
    cluster = Cluster(initialize_head=True, head_node_args=arguments)
    try:
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        signal.signal(signal.SIGTERM, handler)
        del os.environ["RAY_USAGE_STATS_ENABLED"]


def is_busy(node: Any, method: str) -> bool:
    """Whether an actor on a node runs a method: Ray names its processes after what they run."""
    (raylet,) = (info.process.pid for info in node.all_processes["raylet"])
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            process = Path("/proc", pid)
            parent = process.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == raylet and method in process.joinpath("cmdline").read_text():
                return True
    return False
