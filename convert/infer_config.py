"""Infers model sizes from tensor shapes."""

import math
import re
from collections import Counter
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
    "vit.blocks.": "transformer blocks (blocks.0)",
}

# What every Q-Former that reads text has, and its name in messages.
_TEXT_TENSORS = {
    "qformer.embed": "word_embeddings.weight",
    "qformer.positions": "position_embeddings.weight",
}


def layer_count(names: Mapping[str, Any], prefix: str) -> int:
    """1 + the highest layer number after `prefix`; 0 if there is none."""
    matches = (re.match(re.escape(prefix) + r"(\d+)\.", n) for n in names)
    return max((int(m[1]) + 1 for m in matches if m), default=0)


def _usual_size(shapes: Mapping[str, Shape], pattern: str, axis: int, absent: str = "") -> int:
    """The most common size along an axis of the matrices whose names match; 0 without any.

    A single matrix of another shape is then what is reported, and not all that it should fit. UserError,
    with the message `absent` if it is given: there are none.
    """
    sizes = Counter(
        shape[axis]
        for name, shape in shapes.items()
        if len(shape) == 2 and re.fullmatch(pattern, name)
    )
    if absent and not sizes:
        raise UserError(absent)
    return sizes.most_common(1)[0][0] if sizes else 0


def _rows(shape: Shape, width: int) -> int:
    """How many rows of `width` numbers a tensor has."""
    return shape[-2] if len(shape) > 1 else math.prod(shape) // max(1, width)


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
    missing = [
        what
        for prefix, what in _VISION_TENSORS.items()
        if not any(n.startswith(prefix) for n in shapes)
    ]
    if missing:
        raise UserError(
            f"{label} is not a vision encoder: it has no {', '.join(missing)}; expected the tensors of a "
            "ViT such as eva_vit_g.pth, or a model directory of this project"
        )
    block, no_block = r"vit\.blocks\.\d+\.", f"{label}: its vision encoder has no whole layer"
    width = _usual_size(shapes, rf"{block}attn\.qkv\.weight", 1, no_block)
    patch = _patch_size(shapes["vit.patch.weight"], label)
    positions = _rows(shapes["vit.pos"], width)
    grid = grid_side(positions)
    if grid == 0:
        raise UserError(
            f"{label}: pos_embed has shape {shapes['vit.pos']}, and {positions} positions are not a class "
            "token and a square grid of patches"
        )
    blocks = layer_count(shapes, "vit.blocks.")
    depth = blocks - 1 if spare_block else blocks
    if blocks in (39, 40):
        depth = _VISION_DEPTH.get(width, depth)
    return {
        "width": width,
        "depth": depth,
        "heads": _heads("vision.heads", width, _VISION_HEADS, label, settings),
        "mlp": _usual_size(shapes, rf"{block}mlp\.up\.weight", 0, no_block),
        "patch_size": patch,
        "image_size": grid * patch * scale,
    }


def _patch_size(kernel: Shape, label: str) -> int:
    size = kernel[1:]  # [3, p, p], or [3 p p] in this project's files
    patch: int = round((math.prod(size) / 3) ** 0.5)
    if size not in ((3, patch, patch), (3 * patch * patch,)) or patch < 1:
        raise UserError(
            f"{label}: the patch embedding (patch_embed.proj.weight) has shape {kernel}, which is not for "
            "square RGB patches"
        )
    return patch


def qformer_config(
    shapes: Mapping[str, Shape], label: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """QFormerConfig fields from the shapes of the parameters in a file."""
    layers = layer_count(shapes, "qformer.blocks.")
    if "qformer.query" not in shapes or not layers:
        raise UserError(
            f"{label} holds no Q-Former: expected query_tokens and Qformer.bert.encoder layers"
        )
    cross = [
        i for i in range(layers) if any(n.startswith(f"qformer.blocks.{i}.cross.") for n in shapes)
    ]
    every = cross[1] - cross[0] if len(cross) > 1 else layers
    if cross != list(range(0, layers, every)):
        raise UserError(
            f"{label}: cross-attention in layers {cross} of {layers} is not at regular intervals"
        )
    block, no_block = r"qformer\.blocks\.\d+\.", f"{label}: its Q-Former has no whole layer"
    hidden = _usual_size(shapes, rf"{block}attn\.q\.weight", 1, no_block)
    return {
        "queries": _rows(shapes["qformer.query"], hidden),
        "hidden": hidden,
        "layers": layers,
        "heads": _heads("qformer.heads", hidden, _QFORMER_HEADS, label, settings),
        "ffn": _usual_size(shapes, rf"{block}mlp\.up\.weight", 0, no_block),
        "cross_every": every,
        "vision_width": _usual_size(shapes, rf"{block}cross\.[kv]\.weight", 1, no_block),
    }


def text_config(shapes: Mapping[str, Shape], label: str) -> dict[str, Any]:
    """QFormerConfig fields of a text branch and its heads, from the shapes of the parameters in a
    file."""
    for name, key in _TEXT_TENSORS.items():
        shape = shapes.get(name)
        if shape is None or len(shape) != 2:
            found = "is missing" if shape is None else f"has shape {shape}"
            raise UserError(
                f"{label}: {key} {found}; expected the matrix of a Q-Former with a text branch"
            )
    caption = ("qformer.lm_head.", "qformer.temperature")
    return {
        "vocab": shapes["qformer.embed"][0],
        "max_positions": shapes["qformer.positions"][0],
        "itc_width": _usual_size(shapes, r"qformer\.(vision|text)_projection\.weight", 0),
        "lm_head": any(name.startswith(caption) for name in shapes),
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
