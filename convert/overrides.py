"""The defaults of each variant, and --set KEY=VALUE."""

import dataclasses
import difflib
import types
import typing
from typing import Any

from minigpt4_jax.config import (
    VARIANTS,
    LlmConfig,
    LoraConfig,
    ModelConfig,
    QFormerConfig,
    RopeScaling,
    TokenizerConfig,
    VisionConfig,
)
from minigpt4_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Variant:
    """Configuration of a released model (MiniGPT-4 and MiniGPT-v2 papers, stage-2 configs)."""

    qformer: bool
    lora: bool
    merge_patches: int
    image_scale: int  # image size / the size that the position embedding was trained at
    prompt_template: str
    chat_template: str
    end_symbol: str
    max_text_length: int


_VICUNA = "###Human: {} ###Assistant: "
_VARIANTS = {
    "minigpt4-vicuna": Variant(True, False, 1, 1, _VICUNA, "vicuna0", "###", 160),
    "minigpt4-llama2": Variant(False, False, 4, 1, "[INST] {} [/INST] ", "llama2", "</s>", 160),
    "minigpt-v2": Variant(False, True, 4, 2, "[INST] {} [/INST]", "minigptv2", "</s>", 1024),
}


def variant_named(name: str) -> Variant:
    """The variant's defaults. UserError: no such variant."""
    if name not in _VARIANTS:
        raise UserError(f"--variant={name}: expected one of {', '.join(VARIANTS)}")
    return _VARIANTS[name]


def variant_with_chat_template(name: str) -> Variant | None:
    """The variant whose released weights were trained with a chat template; None for other templates."""
    return next((v for v in _VARIANTS.values() if v.chat_template == name), None)


# --- --set ----------------------------------------------------------------------------------------

_PARTS = {
    "vision": VisionConfig, "qformer": QFormerConfig, "llm": LlmConfig, "lora": LoraConfig,
    "tokenizer": TokenizerConfig, "llm.rope_scaling": RopeScaling,
}  # fmt: skip
_ALIASES = {"image_size": "vision.image_size", "patch_size": "vision.patch_size"}


def _setting_types() -> dict[str, Any]:
    """Dotted name -> type of every value that --set can change."""
    setting_types: dict[str, Any] = {}
    for prefix, cls in {"": ModelConfig, **_PARTS}.items():
        hints = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            name = f"{prefix}.{f.name}" if prefix else f.name
            if name != "variant" and name not in _PARTS:
                setting_types[name] = hints[f.name]
    return setting_types


def parse_settings(items: list[str]) -> dict[str, Any]:
    """["vision.depth=3", ...] -> {"vision.depth": 3, ...}. UserError: unknown key, invalid value."""
    known = _setting_types()
    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        key = key.strip()
        if not equals:
            raise UserError(f"--set {item}: expected KEY=VALUE")
        name = _ALIASES.get(key, key)
        if name not in known:
            similar = [k for k in known if k.endswith("." + key.rpartition(".")[2])]
            similar += difflib.get_close_matches(key, [*known, *_ALIASES], n=3, cutoff=0.5)
            similar = list(dict.fromkeys(similar))[:3]
            hint = (
                f"did you mean {' or '.join(similar)}?"
                if similar
                else f"known keys: {', '.join(known)}"
            )
            raise UserError(f"--set {key}: unknown key; {hint}")
        values[name] = _parse(key, text, known[name])
    return values


def _parse(key: str, text: str, annotation: Any) -> Any:
    """The value of a field with this annotation (a type, or a type | None)."""
    options = (
        typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
    )
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    kind = next(k for k in options if k is not type(None))
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind in (int, float):
            value = kind(text)
            if value < 0 or (value == 0 and "_id" not in key and "dropout" not in key):
                raise ValueError
            return value
    except (ValueError, KeyError):
        expected = {bool: "true or false", int: "a whole number > 0", float: "a number > 0"}[kind]
        raise UserError(f"--set {key}={text}: expected {expected}") from None
    if typing.get_origin(kind) is tuple:
        return tuple(t for t in text.split(",") if t)
    # a shell passes "\\n" as two characters
    return text.replace("\\n", "\n").replace("\\t", "\t")


def apply_settings(config: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Set values in a nested configuration; returns the names that this variant does not have."""
    unused = []
    for name, value in settings.items():
        *path, last = name.split(".")
        node: Any = config
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if node is None:
            unused.append(name)
        else:
            node[last] = value
    return unused
