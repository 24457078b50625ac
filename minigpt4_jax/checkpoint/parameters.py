"""Names and shapes of a model's parameters as a model directory stores them.

A name is a dotted parameter path with one tensor per layer: `llm.blocks.3.attn.q.weight`. A part is a
component of the model with files of its own: vit, qformer, projection, lora or llm.
"""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from minigpt4_jax.checkpoint.model_directory import Shape
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.models.layers import SameKey, list_layers
from minigpt4_jax.models.llm import unstack
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.models.stage1 import Stage1
from minigpt4_jax.quantization.layout import storage_shape, to_storage_layout
from minigpt4_jax.utils.platform import backend, unrolls_layers

ParameterPath = tuple[Any, ...]  # in an nnx state: attribute names, and layer numbers of a list
# parameters with a leading axis of layers
STACKED = (("vit", "blocks"), ("llm", "blocks"), ("llm", "encoder_blocks"))


def part_of(name: str) -> str:
    """The part that a parameter belongs to: vit, qformer, projection, lora or llm."""
    if ".lora_" in name:
        return "lora"
    head = name.split(".", 1)[0]
    return "vit" if head == "ln_vision" else head


def abstract_model(config: ModelConfig, *, stacked: bool = True) -> MiniGpt:
    """The model with shapes instead of arrays. stacked=False: the language model's layers in a list, on
    a GPU those of the vision encoder too."""
    return nnx.merge(*_abstract_parts(config, stacked, backend()))


# Tracing the initialization takes a quarter of a second or more. platform: of the layout of groups.
@functools.cache
def _abstract_parts(
    config: ModelConfig, stacked: bool, platform: str
) -> tuple[nnx.GraphDef[MiniGpt], Any]:
    def make() -> MiniGpt:
        rngs: Any = SameKey(jax.random.key(0))
        model: MiniGpt = (Stage1 if config.is_stage1 else MiniGpt)(config, rngs)
        if not stacked and not config.is_stage1:
            model.llm = unstack(model.llm)
        if not stacked and unrolls_layers():
            model.vit.blocks = list_layers(model.vit.blocks, config.vision.depth)
        return model

    return nnx.split(nnx.eval_shape(make))


@functools.cache
def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of every tensor in a complete model directory."""
    shapes: dict[str, Shape] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(abstract_model(config))):
        for name, shape in layer_names(path, leaf.shape):
            shapes[name] = storage_shape(name, shape)
    return shapes


def is_stacked(path: ParameterPath) -> bool:
    """Whether the parameter has a leading axis of layers."""
    return path[:2] in STACKED and not isinstance(path[2], int)


def stacked_path(path: ParameterPath) -> ParameterPath:
    """The path of a parameter if the layers are stacked: without the number of its layer."""
    return path[:2] + path[3:] if path[:2] in STACKED and isinstance(path[2], int) else path


def layer_names(path: ParameterPath, shape: Shape) -> list[tuple[str, Shape]]:
    """(name, shape in memory) of each tensor that a parameter of this shape is stored as."""
    if not is_stacked(path):
        return [(".".join(map(str, path)), shape)]
    rest = ".".join(map(str, path[2:]))
    return [(f"{path[0]}.{path[1]}.{i}.{rest}", shape[1:]) for i in range(shape[0])]


def named_tensors(state: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(name, host array) of every parameter in an nnx state, one tensor per layer."""
    for path, leaf in nnx.to_flat_state(state):
        value = np.asarray(leaf.get_value())
        for i, (name, _) in enumerate(layer_names(path, value.shape)):
            layer = value[i] if is_stacked(path) else value
            yield name, np.ascontiguousarray(to_storage_layout(name, layer))


def check_shapes(
    shapes: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    source: Path | str,
    *,
    partial: bool = False,
) -> None:
    """UserError if the tensors of `source` (name -> shape) are not those of the model. partial: some
    may be missing."""
    problems = [f"{name}: unknown parameter" for name in shapes if name not in expected]
    problems += [
        f"{name}: shape {tuple(shape)}, expected {tuple(expected[name])}"
        for name, shape in shapes.items()
        if name in expected and tuple(shape) != tuple(expected[name])
    ]
    if not partial:
        problems += [f"{name}: missing" for name in expected if name not in shapes]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"{source}: the parameters do not match the model: {'; '.join(problems[:8])}{more}"
        )
