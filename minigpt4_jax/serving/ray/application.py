"""The Ray Serve application of a model: deploy it, wait, and end it without losing an answer."""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from minigpt4_jax.errors import UserError
from minigpt4_jax.serving.limits import Limits
from minigpt4_jax.serving.ray.ingress import Ingress
from minigpt4_jax.serving.ray.replica import Replica
from minigpt4_jax.serving.service import Service

NAME = "minigpt4"  # of the application in Ray
# Ray's own: a session goes to the same replica while that lives, to the next on the ring if it is full.
_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_STARTS = 2  # of a replica that cannot start


class Deployment(NamedTuple):
    """How a model is deployed.

    Attributes:
        replicas: the least and the greatest number of them.
        actor: Ray's options of a replica: resources and environment.
        max_batch: answers that one replica generates together.
        max_queue: requests that wait at an ingress.
        ingresses: number of machines that receive requests.
        shutdown_seconds: for answering what runs.
    """

    replicas: tuple[int, int]
    actor: dict[str, Any]
    max_batch: int
    max_queue: int
    ingresses: int
    shutdown_seconds: float


def build(
    load: Callable[[], tuple[FastAPI, Service]],
    deployment: Deployment,
    *,
    limits: Limits,
    keys: Sequence[str] = (),
    hosts: Sequence[str] | None = None,
    compiled: bool = True,
) -> serve.Application:
    """The application. load: loads the model in a replica. Other arguments: as of the plain server."""
    low, high = deployment.replicas
    size: dict[str, Any] = {"num_replicas": low}
    if high > low:
        scaling = AutoscalingConfig(
            min_replicas=low, max_replicas=high, target_ongoing_requests=deployment.max_batch
        )
        size = {"autoscaling_config": scaling}
    grace: dict[str, Any] = {
        "graceful_shutdown_timeout_s": deployment.shutdown_seconds,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
    deploy_replica = serve.deployment(
        name="Replica",
        ray_actor_options=deployment.actor,
        # twice what runs at once: when one replica is that full, requests go to others
        max_ongoing_requests=2 * deployment.max_batch,
        max_queued_requests=deployment.max_queue,
        request_router_config=RequestRouterConfig(request_router_class=_ROUTER),  # type: ignore[arg-type]
        max_constructor_retry_count=_STARTS,
        **size,
        **grace,
    )
    deploy_ingress = serve.deployment(
        name="Ingress",
        # One on a machine: what a machine's proxy receives goes to the ingress beside it, so that another
        # machine's loss breaks nothing off.
        num_replicas=deployment.ingresses,
        max_replicas_per_node=1,
        ray_actor_options={"num_cpus": 0, "runtime_env": deployment.actor.get("runtime_env")},
        # the gate refuses what is too much, with the status that clients expect
        max_ongoing_requests=1 << 20,
        **grace,
    )
    replica, ingress = deploy_replica(Replica), deploy_ingress(serve.ingress()(Ingress))
    application: serve.Application = ingress.bind(
        replica.bind(load, compiled), limits, list(keys), hosts
    )
    return application


def start(application: serve.Application, host: str, port: int) -> Any:
    """Deploy it, and wait until its replicas are ready. Returns Ray's handle of the ingress.

    UserError: a replica cannot start, or Ray Serve listens elsewhere.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    existing = _serve_address()
    if existing is None:
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    elif existing != (host, port):
        raise UserError(
            f"Ray Serve of this cluster listens on {existing[0]}:{existing[1]} already: pass "
            f"--host={existing[0]} --port={existing[1]}, or end it with `serve shutdown`"
        )
    if existing is not None and NAME in serve.status().applications:
        raise UserError(
            f"{NAME} is deployed on this cluster already; end the command that did, or `serve shutdown`"
        )
    try:
        return serve.run(application, name=NAME, route_prefix="/")
    except BaseException as e:  # also a signal: nothing may be left on the cluster
        reason = _reason() or str(e).strip().rpartition("\n")[2]
        _remove()
        if isinstance(e, (RuntimeError, RayServeException)):
            raise UserError(f"the model cannot be deployed: {reason}") from None
        raise


def _serve_address() -> tuple[str, int] | None:
    """Where Ray Serve of this cluster listens; None if it does not run."""
    try:
        client = _get_global_client()
    except RayServeException:
        return None
    return None if client is None else (client.http_config.host, client.http_config.port)


def _reason() -> str:
    """What a replica said when it could not start."""
    status = serve.status().applications.get(NAME)
    for deployment in status.deployments.values() if status else ():
        if found := re.findall(r"(?:UserError|RequestError): (.*)", deployment.message or ""):
            return str(found[-1])
    return ""


def stop(ingress: Any, seconds: float) -> int:
    """Refuse new requests, wait for those that run, and remove the application, with Ray Serve if nothing
    else is deployed. Returns how many requests were broken off."""
    asked = ingress.broadcast("drain", seconds)
    left = asked.results(timeout_s=seconds + 10, return_exceptions=True)
    _remove()
    return sum(count for count in left if isinstance(count, int))  # not of a lost ingress


def _remove() -> None:
    serve.delete(NAME)
    if not serve.status().applications:
        serve.shutdown()
