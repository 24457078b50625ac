"""A server of a tiny model in a thread, and images as data URLs for it."""

import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from fastapi import FastAPI
from PIL import Image

from minigpt4_jax.inference.model import Model
from minigpt4_jax.serving.app import create_app
from minigpt4_jax.serving.limits import Limits
from minigpt4_jax.serving.scheduler import Scheduler, SchedulerConfig
from minigpt4_jax.serving.server import make_server
from minigpt4_jax.serving.service import Service

NAME = "tiny"
SMALL = SchedulerConfig(
    max_rows=8, max_queue=16, context=256, max_new_tokens=64, prefill_tokens=64, cache_tokens=1024
)


class RunningServer(NamedTuple):
    """Where it listens, and what it runs."""

    url: str
    service: Service


def make_service(
    model: Model, config: SchedulerConfig = SMALL, limits: Limits | None = None
) -> Service:
    return Service(
        model, Scheduler(model, config), NAME, limits=limits, defaults={"max_new_tokens": 12}
    )


@contextlib.contextmanager
def running_server(
    service: Service, port: int = 0, mount: Callable[[FastAPI], None] | None = None, **options
) -> Iterator[RunningServer]:
    """A real uvicorn. port: 0 is a free one. mount: adds to the application. options: of `create_app`."""
    app = create_app(service, **options)
    if mount is not None:
        mount(app)
    server = make_server(app, service, "127.0.0.1", port, shutdown_seconds=5, compiled=False)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server has not started"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield RunningServer(f"http://127.0.0.1:{port}", service)
    finally:
        server.should_exit = True
        thread.join(timeout=60)


def noise(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def data_url(image: Image.Image) -> str:
    """The image as a PNG in a data URL, with its EXIF fields."""
    file = io.BytesIO()
    image.save(file, "PNG", exif=image.getexif())
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def user_message(text: str, *images: Image.Image) -> dict:
    """A message of the user, in parts if it has images."""
    if not images:
        return {"role": "user", "content": text}
    urls = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*urls, {"type": "text", "text": text}]}
