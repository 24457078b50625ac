"""MiniGPT-4 and MiniGPT-v2 in JAX: convert released weights, train the projection, describe images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model, load

__all__ = ["Model", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that `import minigpt4_jax` and the command line's --help do not pay for importing JAX.
    if name in __all__:
        from minigpt4_jax.inference import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
