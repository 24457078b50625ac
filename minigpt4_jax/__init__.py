"""MiniGPT-4, MiniGPT-v2 and BLIP-2 in JAX: convert released weights, train, describe images."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt4_jax.errors import UserError
    from minigpt4_jax.inference.conversation import Conversation
    from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
    from minigpt4_jax.inference.loading import load
    from minigpt4_jax.inference.model import Model
    from minigpt4_jax.training.trainer import train

__all__ = [
    "Conversation", "GenerationConfig", "GenerationOutput", "Model", "UserError", "load", "train",
]  # fmt: skip
__version__ = "0.1.0"

# Public name -> the module that defines it, imported on first use: `import minigpt4_jax` and --help
# do not pay for importing JAX.
_MODULES = {
    "Conversation": "minigpt4_jax.inference.conversation",
    "GenerationConfig": "minigpt4_jax.inference.generation_config",
    "GenerationOutput": "minigpt4_jax.inference.generation_config",
    "Model": "minigpt4_jax.inference.model",
    "UserError": "minigpt4_jax.errors",
    "load": "minigpt4_jax.inference.loading",
}


def __getattr__(name: str) -> Any:
    if name == "train":
        # The submodule, which is callable: it takes this name as soon as anything imports it.
        return importlib.import_module("minigpt4_jax.train")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
