"""Sizes of a model, read from the shapes of its tensors."""

import re
from collections.abc import Mapping
from typing import Any

from convert.resample import grid_side
from minigpt4_jax.config import LORA_TARGETS
from minigpt4_jax.errors import UserError

Shape = tuple[int, ...]

# Not told by shapes, known at the released widths only: heads, and how many blocks are used.
_VISION_HEADS = {1408: 16}
_VISION_DEPTH = {1408: 39}
_QFORMER_HEADS = {768: 12}


def layer_count(names: Mapping[str, Any], prefix: str) -> int:
    """1 + the highest layer number under `prefix`, 0 without any."""
    found = (re.match(re.escape(prefix) + r"(\d+)\.", n) for n in names)
    return max((int(m[1]) + 1 for m in found if m), default=0)


def vision_config(
    shapes: Mapping[str, Shape],
    where: str,
    *,
    spare_block: bool,
    scale: int,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """VisionConfig fields from raw tensor shapes under this project's names.

    spare_block: the file holds one block more than is used (EVA-ViT-g: 40 for 39).
    scale: image size over the one the position embedding is for. given: --set values.
    """
    for name in ("vit.cls", "vit.pos", "vit.patch.weight", "vit.blocks.0.mlp.up.weight"):
        if name not in shapes:
            raise UserError(f"{where} is not a vision encoder: it has no {name}")
    width = shapes["vit.cls"][-1]
    patch = _patch_size(shapes["vit.patch.weight"], where)
    grid = grid_side(shapes["vit.pos"][-2])
    if grid == 0:
        raise UserError(
            f"{where}: {shapes['vit.pos'][-2]} positions are not 1 + a square grid of patches"
        )
    blocks = layer_count(shapes, "vit.blocks.")
    used = blocks - 1 if spare_block else blocks
    if blocks in (39, 40):
        used = _VISION_DEPTH.get(width, used)
    return {
        "width": width,
        "depth": used,
        "heads": _heads("vision.heads", width, _VISION_HEADS, where, given),
        "mlp": shapes["vit.blocks.0.mlp.up.weight"][0],
        "patch_size": patch,
        "image_size": grid * patch * scale,
    }


def _patch_size(kernel: Shape, where: str) -> int:
    patch = kernel[-1] if len(kernel) == 4 else round((kernel[-1] / 3) ** 0.5)
    size = kernel[1:] if len(kernel) == 4 else (kernel[-1],)
    if size not in ((3, patch, patch), (3 * patch * patch,)) or patch < 1:
        raise UserError(f"{where}: a patch embedding of shape {kernel} is not square RGB patches")
    return patch


def qformer_config(
    shapes: Mapping[str, Shape], where: str, given: Mapping[str, Any]
) -> dict[str, Any]:
    """QFormerConfig fields from raw tensor shapes under this project's names."""
    cross = sorted(
        {
            int(m[1])
            for n in shapes
            if (m := re.match(r"qformer\.blocks\.(\d+)\.cross\.k\.weight", n))
        }
    )
    if "qformer.query" not in shapes or not cross or "qformer.blocks.0.mlp.up.weight" not in shapes:
        raise UserError(
            f"{where} holds no Q-Former: expected query_tokens and Qformer.bert.encoder layers"
        )
    layers = layer_count(shapes, "qformer.blocks.")
    every = cross[1] - cross[0] if len(cross) > 1 else layers
    if cross != list(range(0, layers, every)):
        raise UserError(
            f"{where}: cross-attention in layers {cross} of {layers} follows no regular step"
        )
    queries, hidden = shapes["qformer.query"][-2:]
    return {
        "queries": queries,
        "hidden": hidden,
        "layers": layers,
        "heads": _heads("qformer.heads", hidden, _QFORMER_HEADS, where, given),
        "ffn": shapes["qformer.blocks.0.mlp.up.weight"][0],
        "cross_every": every,
        "vision_width": shapes[f"qformer.blocks.{cross[0]}.cross.k.weight"][-1],
    }


def _heads(
    key: str, width: int, known: Mapping[int, int], where: str, given: Mapping[str, Any]
) -> int:
    if key in given:
        return given[key]
    if width not in known:
        raise UserError(
            f"{where}: shapes do not tell how many heads its width {width} has: give --set {key}=N"
        )
    return known[width]


def lora_config(shapes: Mapping[str, Shape], where: str) -> dict[str, Any]:
    """LoraConfig fields from lora_a shapes ([rank, in])."""
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_a")}
    if len(ranks) != 1:
        raise UserError(f"{where}: LoRA ranks {sorted(ranks)}; expected one for all layers")
    found = (re.search(r"\.(\w+)\.lora_a", name) for name in shapes)
    targets = {m[1] for m in found if m}
    return {"rank": ranks.pop(), "targets": tuple(t for t in LORA_TARGETS if t in targets)}
