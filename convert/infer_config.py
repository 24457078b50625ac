"""Infers model sizes from tensor shapes."""

import re
from collections.abc import Mapping
from typing import Any

from convert.resample import grid_side
from minigpt4_jax.config import LORA_TARGETS
from minigpt4_jax.errors import UserError

Shape = tuple[int, ...]

# Shapes do not give the number of heads or of used blocks; they are known for the released widths.
_VISION_HEADS = {1408: 16}
_VISION_DEPTH = {1408: 39}
_QFORMER_HEADS = {768: 12}
# What every vision encoder has, and its name in messages.
_VISION_TENSORS = {
    "vit.cls": "class token (cls_token)",
    "vit.pos": "position embedding (pos_embed)",
    "vit.patch.weight": "patch embedding (patch_embed.proj)",
    "vit.blocks.0.mlp.up.weight": "transformer blocks (blocks.0)",
}


def layer_count(names: Mapping[str, Any], prefix: str) -> int:
    """1 + the highest layer number after `prefix`; 0 if there is none."""
    matches = (re.match(re.escape(prefix) + r"(\d+)\.", n) for n in names)
    return max((int(m[1]) + 1 for m in matches if m), default=0)


def vision_config(
    shapes: Mapping[str, Shape],
    label: str,
    *,
    spare_block: bool,
    scale: int,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """VisionConfig fields from the shapes of the parameters in a file.

    label: the file's name in messages. spare_block: the file has one block more than is used
    (EVA-ViT-g: 40 for 39). scale: image size / the size that the position embedding was trained at.
    settings: --set values.
    """
    if missing := [what for name, what in _VISION_TENSORS.items() if name not in shapes]:
        raise UserError(
            f"{label} is not a vision encoder: it has no {', '.join(missing)}; expected the tensors of a "
            "ViT such as eva_vit_g.pth, or a model directory of this project"
        )
    width = shapes["vit.cls"][-1]
    patch = _patch_size(shapes["vit.patch.weight"], label)
    grid = grid_side(shapes["vit.pos"][-2])
    if grid == 0:
        raise UserError(
            f"{label}: {shapes['vit.pos'][-2]} positions are not a class token and a square grid of patches"
        )
    blocks = layer_count(shapes, "vit.blocks.")
    depth = blocks - 1 if spare_block else blocks
    if blocks in (39, 40):
        depth = _VISION_DEPTH.get(width, depth)
    return {
        "width": width,
        "depth": depth,
        "heads": _heads("vision.heads", width, _VISION_HEADS, label, settings),
        "mlp": shapes["vit.blocks.0.mlp.up.weight"][0],
        "patch_size": patch,
        "image_size": grid * patch * scale,
    }


def _patch_size(kernel: Shape, label: str) -> int:
    patch = kernel[-1] if len(kernel) == 4 else round((kernel[-1] / 3) ** 0.5)
    size = kernel[1:] if len(kernel) == 4 else (kernel[-1],)
    if size not in ((3, patch, patch), (3 * patch * patch,)) or patch < 1:
        raise UserError(
            f"{label}: a patch embedding of shape {kernel} is not for square RGB patches"
        )
    return patch


def qformer_config(
    shapes: Mapping[str, Shape], label: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """QFormerConfig fields from the shapes of the parameters in a file."""
    cross = sorted(
        {
            int(m[1])
            for n in shapes
            if (m := re.match(r"qformer\.blocks\.(\d+)\.cross\.k\.weight", n))
        }
    )
    if "qformer.query" not in shapes or not cross or "qformer.blocks.0.mlp.up.weight" not in shapes:
        raise UserError(
            f"{label} holds no Q-Former: expected query_tokens and Qformer.bert.encoder layers"
        )
    layers = layer_count(shapes, "qformer.blocks.")
    every = cross[1] - cross[0] if len(cross) > 1 else layers
    if cross != list(range(0, layers, every)):
        raise UserError(
            f"{label}: cross-attention in layers {cross} of {layers} is not at regular intervals"
        )
    queries, hidden = shapes["qformer.query"][-2:]
    return {
        "queries": queries,
        "hidden": hidden,
        "layers": layers,
        "heads": _heads("qformer.heads", hidden, _QFORMER_HEADS, label, settings),
        "ffn": shapes["qformer.blocks.0.mlp.up.weight"][0],
        "cross_every": every,
        "vision_width": shapes[f"qformer.blocks.{cross[0]}.cross.k.weight"][-1],
    }


def text_config(shapes: Mapping[str, Shape], label: str) -> dict[str, Any]:
    """QFormerConfig fields of a text branch and its heads, from the shapes of the parameters in a
    file."""
    for name in ("qformer.embed", "qformer.positions"):
        if name not in shapes:
            raise UserError(f"{label}: its Q-Former has no text branch ({name})")
    itc = shapes.get("qformer.vision_projection.weight", (0,))
    return {
        "vocab": shapes["qformer.embed"][0],
        "max_positions": shapes["qformer.positions"][0],
        "itc_width": itc[0],
        "lm_head": "qformer.lm_head.bias" in shapes,
    }


def _heads(
    key: str, width: int, known: Mapping[int, int], label: str, settings: Mapping[str, Any]
) -> int:
    if key in settings:
        return int(settings[key])
    if width not in known:
        raise UserError(
            f"{label}: the number of heads at width {width} does not follow from shapes: give "
            f"--set {key}=N"
        )
    return known[width]


def lora_config(shapes: Mapping[str, Shape], label: str) -> dict[str, Any]:
    """LoraConfig fields from lora_a shapes ([rank, in])."""
    ranks = {shape[0] for name, shape in shapes.items() if name.endswith(".lora_a")}
    if len(ranks) != 1:
        raise UserError(f"{label}: LoRA ranks {sorted(ranks)}; expected one for all layers")
    matches = (re.search(r"\.(\w+)\.lora_a", name) for name in shapes)
    targets = {m[1] for m in matches if m}
    return {"rank": ranks.pop(), "targets": tuple(t for t in LORA_TARGETS if t in targets)}
