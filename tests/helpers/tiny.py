"""A model directory with a few thousand parameters, and a dataset of a few coloured images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.paths import TOKENIZER
from minigpt4_jax.checkpoint import writer
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.config import LlmConfig, ModelConfig, QFormerConfig, VisionConfig

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "black": (5, 5, 5)}


def config(*, qformer: bool = True, llm_layers: int = 2, **changes) -> ModelConfig:
    """llm_layers: 1 where the model's numbers are not the subject; its programs compile a fifth faster."""
    vision = VisionConfig(image_size=28, patch_size=14, width=16, depth=2, heads=2, mlp=24)
    q = QFormerConfig(queries=3, hidden=16, layers=2, heads=2, ffn=24, vision_width=16, dropout=0.1)
    llm = LlmConfig(
        vocab=785, width=24, layers=llm_layers, heads=2, kv_heads=1, head_dim=12, ffn=32
    )
    variant = "minigpt4-vicuna" if qformer else "minigpt4-llama2"
    made = {"variant": variant, "llm": llm, "vision": vision} | changes
    return ModelConfig(qformer=q if qformer else None, **made).check()


def write_model(out: Path, seed: int = 0, **changes) -> Path:
    """A model directory with random weights on the scale of an initialization, and the small tokenizer."""
    rng = np.random.default_rng(seed)
    return _write(
        out, config(**changes), lambda shape: rng.uniform(-1, 1, shape) * shape[-1] ** -0.5
    )


def write_random_model(
    out: Path, scale: float = 0.3, tokenizer_files: Path = TOKENIZER, **changes
) -> Path:
    """As write_model, with larger weights, so that outputs depend on the inputs."""
    rng = np.random.default_rng(0)
    return _write(
        out, config(**changes), lambda shape: rng.normal(0, scale, shape), tokenizer_files
    )


def _write(
    out: Path,
    c: ModelConfig,
    draw: Callable[[tuple[int, ...]], np.ndarray],
    tokenizer_files: Path = TOKENIZER,
) -> Path:
    """Write the tensors from NumPy: compiling an initialization would take seconds."""
    tensors = {
        name: (draw(shape) + name.endswith("scale")).astype(np.float32)
        for name, shape in parameter_shapes(c).items()
    }
    files = {p.name: p for p in tokenizer_files.iterdir()}
    return writer.write_model(out, c, tensors.items(), tokenizer=files)


def write_data(folder: Path, rows: int = 12, seed: int = 0) -> Path:
    """rows.jsonl of {"image", "caption"} with plain images beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(rows):
        name = list(COLORS)[i % len(COLORS)]
        pixels = np.clip(rng.normal(COLORS[name], 12, (32, 40, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"a {name} square number {i}"}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path
