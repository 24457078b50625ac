"""The platform that programs are traced for: the default backend or a compilation target."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

_TARGET: ContextVar[str | None] = ContextVar("target", default=None)


def backend() -> str:
    """The platform of programs traced in this context: "cpu", "gpu" or "tpu"."""
    return _TARGET.get() or jax.default_backend()


@contextlib.contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Trace programs for another platform than this machine's."""
    token = _TARGET.set(platform)
    try:
        yield
    finally:
        _TARGET.reset(token)
