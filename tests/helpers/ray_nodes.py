"""A Ray cluster of two nodes on this machine."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

# A killed node counts as lost after two seconds.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000,
          "health_check_failure_threshold": 2, "health_check_timeout_ms": 1000}  # fmt: skip
STORE = 80 << 20  # bytes of a node's shared memory


@contextlib.contextmanager
def two_nodes(cpus: int = 1) -> Iterator[tuple[Cluster, Any]]:
    """-> (the cluster, its second node), this process connected to it."""
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "1"}
    os.environ.update(environment)
    head = {
        "num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False,
        "_system_config": HEALTH,
    }  # fmt: skip
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = cluster.add_node(num_cpus=cpus, object_store_memory=STORE)
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster, second
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name in environment:
            del os.environ[name]


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
