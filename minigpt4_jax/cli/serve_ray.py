"""python -m minigpt4_jax.serve --ray: replicas of the server on a Ray cluster, through Ray Serve.

`build` is what a Serve configuration file names (deploy/rayservice.yaml).
"""

import argparse
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from minigpt4_jax.cli import common, ray_cluster, serve_options

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray import serve

    from minigpt4_jax.serving.service import Service

log = logging.getLogger("minigpt4_jax.serving")


def load(args: argparse.Namespace) -> "tuple[FastAPI, Service]":
    """In a replica: the model, and the application of the plain server. The ingress has checked keys."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("minigpt4_jax").setLevel(logging.INFO)
    from minigpt4_jax.serving.app import create_app

    service = serve_options.make_service(common.load_model(args), args)
    app = create_app(service, allow_image_urls=args.allow_image_urls, log_prompts=args.log_prompts)
    return app, service


def make_application(
    args: argparse.Namespace, keys: Sequence[str], hosts: Sequence[str] | None = None
) -> "serve.Application":
    """The Ray Serve application of a command line, for the cluster that this process is connected to."""
    from minigpt4_jax.serving.ray.application import Deployment, build

    needs = ray_cluster.model_needs(args)
    low, high = ray_cluster.num_models(args, needs)
    deployment = Deployment(
        replicas=(low if args.ray_models else 1, high),
        actor=needs.options() | {"runtime_env": ray_cluster.runtime_env()},
        max_batch=args.max_batch,
        max_queue=args.max_queue,
        ingresses=min(high, ray_cluster.num_machines()),
        shutdown_seconds=args.shutdown_timeout,
    )
    limits = serve_options.limits_of(args)
    return build(
        partial(load, args), deployment,
        limits=limits, keys=keys, hosts=hosts, compiled=args.warm_up,
    )  # fmt: skip


def parse(options: Mapping[str, Any]) -> argparse.Namespace:
    """The command line of options without dashes: {"model": "/model"}. UserError: wrong ones."""
    words = ["--ray"]
    for name, value in options.items():
        words += [f"--{name}"] if value is True else [f"--{name}={value}"]
    return serve_options.parse(words)


def build(options: dict[str, Any]) -> "serve.Application":
    """The application of a Serve configuration file, whose `args` are the options of the command.

    UserError: wrong options.
    """
    args = parse(options)
    return make_application(args, serve_options.read_keys(args.api_key_file))


def main(args: argparse.Namespace, keys: Sequence[str]) -> int:
    """Deploy, serve until SIGTERM or Ctrl-C, and end when what runs is answered."""
    ray_cluster.require("serve")
    with ray_cluster.connected(args.ray):
        from minigpt4_jax.serving.ray import application

        _on_signal(_leave)
        begin = time.monotonic()
        port = args.port or _free_port(args.host)
        made = make_application(args, keys, serve_options.allowed_hosts(args, keys))
        ingress = application.start(made, args.host, port)
        stopped = threading.Event()
        _on_signal(lambda *_: stopped.set())
        log.info("listening on http://%s:%d", args.host, port)
        log.info("ready in %.1f s", time.monotonic() - begin)
        stopped.wait()
        log.info("stopping")
        left = application.stop(ingress, args.shutdown_timeout)
        if left:
            log.warning("%d requests took too long and were broken off", left)
    return 0


def _on_signal(handler: Callable[..., object]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _leave(*_: object) -> NoReturn:
    """Before the server is ready: end at once, without replicas that start for nobody."""
    raise SystemExit(0)


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
