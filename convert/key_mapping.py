"""Maps checkpoint keys to parameter names: one table for each format, strict in both directions.

A key matches exactly one rule, or is on the table's ignore list, or is reported as unknown.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from convert.resample import resample_positions
from minigpt4_jax.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """How a stored tensor becomes a parameter.

    fits(source_shape, target_shape): whether it can; apply(array, target_shape): the parameter.
    """

    fits: Callable[[Shape, Shape], bool]
    apply: Callable[[np.ndarray, Shape], np.ndarray]


IDENTITY = Transform(lambda source, target: source == target, lambda x, target: x)
# Drops leading axes of length 1.
RESHAPE = Transform(
    lambda source, target: math.prod(source) == math.prod(target) and source[-1:] == target[-1:],
    lambda x, target: x.reshape(target),
)
# Turns a convolution kernel [D, 3, p, p] into [D, 3*p*p].
FLATTEN = Transform(
    lambda source, target: source[:1] == target[:1] and math.prod(source) == math.prod(target),
    lambda x, target: x.reshape(target),
)
# Interpolates position embeddings if the image size differs.
RESAMPLE = Transform(
    lambda source, target: source[-1:] == target[-1:] and math.prod(source[:-2]) == 1,
    lambda x, target: (
        x.reshape(target) if x.shape[-2:] == target else resample_positions(x, target[0])
    ),
)


def unpermute(heads: int) -> Transform:
    """Undo llama.cpp's order of query and key rows: pairs (2i, 2i+1) back to halves (i, i+h/2)."""

    def apply(x: np.ndarray, target: Shape) -> np.ndarray:
        half = x.shape[0] // heads // 2
        return x.reshape(heads, half, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return Transform(IDENTITY.fits, apply)


@dataclass(frozen=True)
class Rule:
    """Keys like `source` become parameters like `target`; {} is a number, {*} is any text."""

    source: str
    target: str
    transform: Transform = IDENTITY

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(_regex(self.source))

    def with_prefix(self, prefix: str) -> "Rule":
        """The same rule for keys that begin with `prefix`."""
        return Rule(prefix + self.source, self.target, self.transform)


def _regex(template: str) -> str:
    return re.escape(template).replace(r"\{\*\}", "(.+)").replace(r"\{\}", r"(\d+)")


def translate(source: str, target: str, name: str) -> str | None:
    """`name` rewritten from the template `source` to the template `target`; None if it differs."""
    if not (m := re.fullmatch(_regex(source), name)):
        return None
    groups = iter(m.groups())
    return re.sub(r"\{\*?\}", lambda _: next(groups), target)


@dataclass
class KeyTable:
    """The rules of one format. ignored: keys it may also hold, which are not used."""

    name: str
    rules: list[Rule]
    ignored: list[re.Pattern[str]] = field(default_factory=list)


@dataclass(frozen=True)
class MappedKey:
    """The key that a parameter is read from, and its transform."""

    key: str
    transform: Transform


def map_keys(table: KeyTable, keys: Iterable[str]) -> tuple[dict[str, MappedKey], list[str]]:
    """(parameter -> its key and transform, unknown keys).

    UserError when two keys map to the same parameter.
    """
    mapped: dict[str, MappedKey] = {}
    unknown = []
    for key in keys:
        rule = next((r for r in table.rules if r.pattern.fullmatch(key)), None)
        if rule is None:
            if not any(p.fullmatch(key) for p in table.ignored):
                unknown.append(key)
            continue
        target = translate(rule.source, rule.target, key) or rule.target
        if target in mapped:
            raise UserError(
                f"{table.name}: {mapped[target].key} and {key} are the same parameter, {target}"
            )
        mapped[target] = MappedKey(key, rule.transform)
    return mapped, unknown


def original_key(table: KeyTable, name: str) -> str | None:
    """The key of one of this project's parameters in a table's format; None if it has none."""
    for rule in table.rules:
        if key := translate(rule.target, rule.source, name):
            return key
    return None


def key_as_in(table: KeyTable, name: str, keys: Collection[str]) -> str | None:
    """As `original_key`, spelled as these keys of a file are: formats have prefixes that may be absent, and
    adapters with and without a name."""
    heads = {key.partition(".")[0] for key in keys}
    found = [(rule, translate(rule.target, rule.source, name)) for rule in table.rules]
    spellings = [(rule, key) for rule, key in found if key]
    if not spellings:
        return None

    def likeness(spelling: tuple[Rule, str]) -> tuple[bool, bool, int]:
        rule, key = spelling
        same_rule = any(rule.pattern.fullmatch(other) for other in keys)
        return same_rule, key.partition(".")[0] in heads, -len(key)

    return max(spellings, key=likeness)[1]


_NORMS = ("norm", "q_norm", "k_norm", "ln_vision")


def module_rules(source: str, target: str, modules: Iterable[tuple[str, str]]) -> list[Rule]:
    """Rules for weight and bias of each (source module, target module).

    The weight of a norm is named `scale` here.
    """
    rules = []
    for source_module, target_module in modules:
        is_norm = target_module.rpartition(".")[2].startswith(_NORMS)
        weight = "scale" if is_norm else "weight"
        rules.append(Rule(f"{source}{source_module}.weight", f"{target}{target_module}.{weight}"))
        rules.append(Rule(f"{source}{source_module}.bias", f"{target}{target_module}.bias"))
    return rules


def ignore(*patterns: str) -> list[re.Pattern[str]]:
    return [re.compile(p) for p in patterns]


# --- EVA-ViT-g (the original's eva_vit.py) ------------------------------------------------------

VIT_RULES = [
    Rule("cls_token", "vit.cls", RESHAPE),
    Rule("pos_embed", "vit.pos", RESAMPLE),
    Rule("patch_embed.proj.weight", "vit.patch.weight", FLATTEN),
    Rule("patch_embed.proj.bias", "vit.patch.bias"),
    Rule("blocks.{}.attn.q_bias", "vit.blocks.{}.attn.q_bias"),
    Rule("blocks.{}.attn.v_bias", "vit.blocks.{}.attn.v_bias"),
    Rule("blocks.{}.attn.qkv.weight", "vit.blocks.{}.attn.qkv.weight"),
    *module_rules(
        "blocks.{}.",
        "vit.blocks.{}.",
        [
            ("norm1", "norm1"),
            ("norm2", "norm2"),
            ("attn.proj", "attn.out"),
            ("mlp.fc1", "mlp.up"),
            ("mlp.fc2", "mlp.down"),
        ],
    ),
]

EVA = KeyTable(
    "EVA-ViT", VIT_RULES, ignore(r"(head|norm|fc_norm|lm_head)\.(weight|bias)", "mask_token")
)

# --- BLIP-2 (Q-Former and ln_vision) ------------------------------------------------------------

LN_VISION_RULES = module_rules("", "", [("ln_vision", "ln_vision")])
QFORMER_ATTENTION = [
    ("self.query", "q"),
    ("self.key", "k"),
    ("self.value", "v"),
    ("output.dense", "out"),
    ("output.LayerNorm", "norm"),
]
QFORMER_RULES = [
    Rule("query_tokens", "qformer.query", RESHAPE),
    *module_rules("Qformer.bert.", "qformer.", [("embeddings.LayerNorm", "norm")]),
    *module_rules(
        "Qformer.bert.encoder.layer.{}.attention.", "qformer.blocks.{}.attn.", QFORMER_ATTENTION
    ),
    *module_rules(
        "Qformer.bert.encoder.layer.{}.crossattention.",
        "qformer.blocks.{}.cross.",
        QFORMER_ATTENTION,
    ),
    *module_rules(
        "Qformer.bert.encoder.layer.{}.",
        "qformer.blocks.{}.mlp.",
        [
            ("intermediate_query.dense", "up"),
            ("output_query.dense", "down"),
            ("output_query.LayerNorm", "norm"),
        ],
    ),
]
_QFORMER_TEXT = (  # the Q-Former's text branch, which MiniGPT-4 removes
    r"Qformer\.bert\.embeddings\.(position_ids|(word|position)_embeddings\.weight)",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
    r"Qformer\.cls\..*",
)

BLIP2 = KeyTable(
    "BLIP-2",
    QFORMER_RULES + LN_VISION_RULES,
    ignore(
        *_QFORMER_TEXT,
        r"(t5|opt|vision|text)_proj\.(weight|bias)",
        # second names of an embedding: of the language model that BLIP-2 was trained with
        r"(t5_model\.(encoder|decoder)\.embed_tokens|opt_model\.lm_head)\.weight",
        r"itm_head\.(weight|bias)",
        "temp",
    ),
)

# --- language models in the Hugging Face layout (LLaMA, Vicuna, Mistral, Qwen, SmolLM2) ----------

_LLM_LAYER = [
    ("input_layernorm", "norm1"),
    ("post_attention_layernorm", "norm2"),
    ("self_attn.q_proj", "attn.q"),
    ("self_attn.k_proj", "attn.k"),
    ("self_attn.v_proj", "attn.v"),
    ("self_attn.o_proj", "attn.o"),
    ("self_attn.q_norm", "attn.q_norm"),
    ("self_attn.k_norm", "attn.k_norm"),
    ("mlp.gate_proj", "mlp.gate"),
    ("mlp.up_proj", "mlp.up"),
    ("mlp.down_proj", "mlp.down"),
]
_LLM_BODY = [
    Rule("embed_tokens.weight", "llm.embed"),
    Rule("norm.weight", "llm.norm.scale"),
    *module_rules("layers.{}.", "llm.blocks.{}.", _LLM_LAYER),
]
_ROTARY = r"(.*\.)?rotary_emb\.inv_freq"

LLM = KeyTable(
    "language model",
    [
        *(r.with_prefix("model.") for r in _LLM_BODY),
        *_LLM_BODY,
        Rule("lm_head.weight", "llm.head.weight"),
    ],
    ignore(_ROTARY),
)

_GGUF_LAYER = [
    ("attn_norm", "norm1"),
    ("ffn_norm", "norm2"),
    ("attn_q", "attn.q"),
    ("attn_k", "attn.k"),
    ("attn_v", "attn.v"),
    ("attn_output", "attn.o"),
    ("attn_q_norm", "attn.q_norm"),
    ("attn_k_norm", "attn.k_norm"),
    ("ffn_gate", "mlp.gate"),
    ("ffn_up", "mlp.up"),
    ("ffn_down", "mlp.down"),
]


def gguf_table(heads: int, kv_heads: int, permuted: bool) -> KeyTable:
    """llama.cpp's names. permuted: query and key rows are reordered ("llama" architecture)."""
    rules = [
        Rule("token_embd.weight", "llm.embed"),
        Rule("output_norm.weight", "llm.norm.scale"),
        Rule("output.weight", "llm.head.weight"),
        *module_rules("blk.{}.", "llm.blocks.{}.", _GGUF_LAYER),
    ]
    if permuted:
        transforms = {".attn_q.": unpermute(heads), ".attn_k.": unpermute(kv_heads)}
        rules = [
            Rule(
                r.source,
                r.target,
                next((t for part, t in transforms.items() if part in r.source), IDENTITY),
            )
            for r in rules
        ]
    return KeyTable("GGUF", rules, ignore(r"rope_freqs\.weight"))


# --- fine-tuned MiniGPT-4 checkpoints (the parameters that were not frozen) ----------------------

_PEFT = "llama_model.base_model.model.model.layers.{}."
_LORA = [
    Rule(
        f"{_PEFT}{source}.lora_{ab}.{adapter}weight", f"llm.blocks.{{}}.{target}.lora_{ab.lower()}"
    )
    for adapter in ("", "default.")  # peft 0.2; peft 0.3 and later
    for source, target in _LLM_LAYER
    if source.endswith("_proj")
    for ab in "AB"
]

FINE_TUNED = KeyTable(
    "fine-tuned checkpoint",
    [
        *module_rules("", "", [("llama_proj", "projection")]),
        *_LORA,
        *QFORMER_RULES,
        *LN_VISION_RULES,
        *(r.with_prefix("visual_encoder.") for r in VIT_RULES),
    ],
    ignore(r"llama_model\." + _ROTARY, *_QFORMER_TEXT),
)

# --- this project's own files -------------------------------------------------------------------

_NATIVE = ("vit.{*}", "ln_vision.{*}", "qformer.{*}", "projection.{*}")
_NATIVE_LORA = tuple(f"llm.blocks.{{}}.{{*}}.lora_{ab}" for ab in "ab")
NATIVE = KeyTable(
    "this project's weights",
    [Rule("vit.pos", "vit.pos", RESAMPLE), *(Rule(name, name) for name in _NATIVE + _NATIVE_LORA)],
)
