"""The platform that programs are traced for: the default backend, or a compilation target."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


def backend() -> str:
    """The platform that programs traced now are for: "cpu", "gpu" or "tpu"."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Within it, programs are traced for a platform that is not this machine's."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)
