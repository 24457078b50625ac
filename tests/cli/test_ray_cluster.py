"""What a model needs of a machine of a Ray cluster, and how many find a place; without Ray."""

import pytest

from minigpt4_jax.cli import batch, ray_cluster
from minigpt4_jax.cli.ray_cluster import Needs
from minigpt4_jax.errors import UserError

CPUS = [{"CPU": 8.0}, {"CPU": 4.0}]
GPUS = [{"CPU": 4.0}, {"CPU": 32.0, "GPU": 8.0}, {"CPU": 32.0, "GPU": 4.0}]
TPUS = [{"CPU": 96.0, "TPU": 4.0}] * 2


def plan(monkeypatch, machines, *options):
    """-> (what a model needs, the least and the greatest number of models)."""
    monkeypatch.setattr(ray_cluster, "_machines", lambda: machines)
    args = batch.parse(["--model=m", "--input=i", "--output=o", "--ray=local", *options])
    needs = ray_cluster.model_needs(args)
    return needs, ray_cluster.num_models(args, needs)


@pytest.mark.parametrize(
    ("machines", "options", "needs", "models"),
    [
        # one on each machine without GPUs
        (CPUS, [], Needs(4, 0, {}), (3, 3)),
        (CPUS, ["--ray-cpus=8"], Needs(8, 0, {}), (1, 1)),
        (CPUS, ["--mesh=model:2"], Needs(4, 0, {}), (3, 3)),
        # one on each GPU, or on as many as the mesh has
        (GPUS, [], Needs(1, 1, {}), (12, 12)),
        (GPUS, ["--mesh=data:2,model:2"], Needs(1, 4, {}), (3, 3)),
        (GPUS, ["--mesh=auto"], Needs(1, 8, {}), (1, 1)),
        (GPUS, ["--ray-gpus=0.5", "--ray-cpus=16"], Needs(16, 0.5, {}), (4, 4)),
        (GPUS, ["--ray-gpus=0", "--ray-cpus=4"], Needs(4, 0, {}), (17, 17)),
        (TPUS, ["--ray-resources=TPU:4"], Needs(1, 0, {"TPU": 4}), (2, 2)),
        # as many as the command says, where a cluster may grow
        (CPUS, ["--ray-gpus=1", "--ray-models=2:16"], Needs(1, 1, {}), (2, 16)),
    ],
)
def test_models_find_a_place(monkeypatch, machines, options, needs, models):
    assert plan(monkeypatch, machines, *options) == (needs, models)


@pytest.mark.parametrize("options", [["--mesh=model:16"], ["--ray-resources=TPU:1"]])
def test_a_cluster_without_room_is_refused(monkeypatch, options):
    with pytest.raises(UserError, match="no machine of the Ray cluster has 1 CPUs"):
        plan(monkeypatch, GPUS, *options)


def test_no_secrets_are_passed_on(monkeypatch):
    for name in (
        "JAX_PLATFORMS",
        "XLA_FLAGS",
        "MINIGPT4_JAX_CACHE",
        "MINIGPT4_JAX_API_KEY",
        "HF_TOKEN",
    ):
        monkeypatch.setenv(name, "value")
    passed = ray_cluster.runtime_env()["env_vars"]
    assert {"JAX_PLATFORMS", "XLA_FLAGS", "MINIGPT4_JAX_CACHE"} <= {*passed}
    assert not {"MINIGPT4_JAX_API_KEY", "HF_TOKEN"} & {*passed}
