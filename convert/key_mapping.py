"""Which key of a checkpoint becomes which parameter: one table a format, strict both ways.

A key matches exactly one rule, or is on the table's ignore list, or is reported.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from convert.resample import resample_positions
from minigpt4_jax.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A change on the way: `fits` says whether a source shape can become the wanted one."""

    fits: Callable[[Shape, Shape], bool]
    apply: Callable[[np.ndarray, Shape], np.ndarray]


KEEP = Transform(lambda have, want: have == want, lambda x, want: x)
# Leading axes of length 1 are dropped; a convolution kernel [D, 3, p, p] becomes [D, 3*p*p].
RESHAPE = Transform(
    lambda have, want: math.prod(have) == math.prod(want) and have[-1:] == want[-1:],
    lambda x, want: x.reshape(want),
)
FLATTEN = Transform(
    lambda have, want: have[:1] == want[:1] and math.prod(have) == math.prod(want),
    lambda x, want: x.reshape(want),
)
POSITIONS = Transform(
    lambda have, want: have[-1] == want[-1],
    lambda x, want: x.reshape(want) if x.shape[-2:] == want else resample_positions(x, want[0]),
)


def unpermute(heads: int) -> Transform:
    """Undo llama.cpp's order of query and key rows: pairs (2i, 2i+1) back to halves (i, i+h/2)."""

    def apply(x: np.ndarray, want: Shape) -> np.ndarray:
        half = x.shape[0] // heads // 2
        return x.reshape(heads, half, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return Transform(KEEP.fits, apply)


@dataclass(frozen=True)
class Rule:
    """Keys like `key` become parameters like `target`; {} stands for a number, {*} for anything."""

    key: str
    target: str
    transform: Transform = KEEP

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        return re.compile(_expression(self.key))

    def under(self, prefix: str) -> "Rule":
        """The same rule for keys that begin with `prefix`."""
        return Rule(prefix + self.key, self.target, self.transform)


def _expression(template: str) -> str:
    return re.escape(template).replace(r"\{\*\}", "(.+)").replace(r"\{\}", r"(\d+)")


def translate(source: str, target: str, name: str) -> str | None:
    """`name`, if it looks like the template `source`, as the template `target` has it."""
    if not (m := re.fullmatch(_expression(source), name)):
        return None
    parts = iter(m.groups())
    return re.sub(r"\{\*?\}", lambda _: next(parts), target)


@dataclass
class Table:
    """The rules of one format, and what it may hold besides that is knowingly not used."""

    name: str
    rules: list[Rule]
    ignored: list[re.Pattern[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Match:
    """Where one parameter comes from."""

    key: str
    transform: Transform


def match(table: Table, keys: Iterable[str]) -> tuple[dict[str, Match], list[str]]:
    """(parameter -> its key and transform, keys that the table does not know).

    UserError when two keys claim the same parameter.
    """
    found: dict[str, Match] = {}
    unknown = []
    for key in keys:
        rule = next((r for r in table.rules if r.pattern.fullmatch(key)), None)
        if rule is None:
            if not any(p.fullmatch(key) for p in table.ignored):
                unknown.append(key)
            continue
        target = translate(rule.key, rule.target, key) or rule.target
        if target in found:
            other = found[target].key
            raise UserError(f"{table.name}: {other} and {key} are the same parameter")
        found[target] = Match(key, rule.transform)
    return found, unknown


def original_key(table: Table, name: str) -> str | None:
    """The key a table has for one of this project's parameters."""
    for rule in table.rules:
        if key := translate(rule.target, rule.key, name):
            return key
    return None


_NORMS = ("norm", "q_norm", "k_norm", "ln_vision")


def _layers(source: str, target: str, modules: Iterable[tuple[str, str]]) -> list[Rule]:
    """Rules for weight and bias of each (their module, ours); a norm's weight is its scale."""
    rules = []
    for theirs, ours in modules:
        is_norm = ours.rpartition(".")[2].startswith(_NORMS)
        weight = "scale" if is_norm else "weight"
        rules.append(Rule(f"{source}{theirs}.weight", f"{target}{ours}.{weight}"))
        rules.append(Rule(f"{source}{theirs}.bias", f"{target}{ours}.bias"))
    return rules


def _ignore(*patterns: str) -> list[re.Pattern[str]]:
    return [re.compile(p) for p in patterns]


# --- EVA-ViT-g (the original's eva_vit.py) ------------------------------------------------------

_VIT = [
    Rule("cls_token", "vit.cls", RESHAPE),
    Rule("pos_embed", "vit.pos", POSITIONS),
    Rule("patch_embed.proj.weight", "vit.patch.weight", FLATTEN),
    Rule("patch_embed.proj.bias", "vit.patch.bias"),
    Rule("blocks.{}.attn.q_bias", "vit.blocks.{}.attn.q_bias"),
    Rule("blocks.{}.attn.v_bias", "vit.blocks.{}.attn.v_bias"),
    Rule("blocks.{}.attn.qkv.weight", "vit.blocks.{}.attn.qkv.weight"),
    *_layers(
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

EVA = Table("EVA-ViT", _VIT, _ignore(r"(head|norm|fc_norm|lm_head)\.(weight|bias)", "mask_token"))

# --- BLIP-2 (Q-Former and ln_vision) ------------------------------------------------------------

_LN_VISION = _layers("", "", [("ln_vision", "ln_vision")])
_ATTENTION = [
    ("self.query", "q"),
    ("self.key", "k"),
    ("self.value", "v"),
    ("output.dense", "out"),
    ("output.LayerNorm", "norm"),
]
_QFORMER = [
    Rule("query_tokens", "qformer.query", RESHAPE),
    *_layers("Qformer.bert.", "qformer.", [("embeddings.LayerNorm", "norm")]),
    *_layers("Qformer.bert.encoder.layer.{}.attention.", "qformer.blocks.{}.attn.", _ATTENTION),
    *_layers(
        "Qformer.bert.encoder.layer.{}.crossattention.", "qformer.blocks.{}.cross.", _ATTENTION
    ),
    *_layers(
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

BLIP2 = Table(
    "BLIP-2",
    _QFORMER + _LN_VISION,
    _ignore(
        *_QFORMER_TEXT,
        r"(t5|opt|vision|text)_proj\.(weight|bias)",
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
    *_layers("layers.{}.", "llm.blocks.{}.", _LLM_LAYER),
]
_ROTARY = r"(.*\.)?rotary_emb\.inv_freq"

LLM = Table(
    "language model",
    [
        *(r.under("model.") for r in _LLM_BODY),
        *_LLM_BODY,
        Rule("lm_head.weight", "llm.head.weight"),
    ],
    _ignore(_ROTARY),
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


def gguf_table(heads: int, kv_heads: int, permuted: bool) -> Table:
    """llama.cpp's names. permuted: query and key rows are reordered ("llama" architecture only)."""
    rules = [
        Rule("token_embd.weight", "llm.embed"),
        Rule("output_norm.weight", "llm.norm.scale"),
        Rule("output.weight", "llm.head.weight"),
        *_layers("blk.{}.", "llm.blocks.{}.", _GGUF_LAYER),
    ]
    if permuted:
        turned = {".attn_q.": unpermute(heads), ".attn_k.": unpermute(kv_heads)}
        rules = [
            Rule(r.key, r.target, next((t for part, t in turned.items() if part in r.key), KEEP))
            for r in rules
        ]
    return Table("GGUF", rules, _ignore(r"rope_freqs\.weight"))


# --- fine-tuned MiniGPT-4 checkpoints: what was not frozen --------------------------------------

_PEFT = "llama_model.base_model.model.model.layers.{}."
_ADAPTED = [(theirs, ours) for theirs, ours in _LLM_LAYER if theirs.endswith("_proj")]
_LORA = [
    Rule(f"{_PEFT}{theirs}.lora_{ab}.{middle}weight", f"llm.blocks.{{}}.{ours}.lora_{ab.lower()}")
    for middle in ("", "default.")  # peft 0.2, and 0.3 on
    for theirs, ours in _ADAPTED
    for ab in "AB"
]

FINE_TUNED = Table(
    "fine-tuned checkpoint",
    [
        *_layers("", "", [("llama_proj", "projection")]),
        *_LORA,
        *_QFORMER,
        *_LN_VISION,
        *(r.under("visual_encoder.") for r in _VIT),
    ],
    _ignore(r"llama_model\." + _ROTARY, *_QFORMER_TEXT),
)

# --- this project's own files -------------------------------------------------------------------

_OWN = ("vit.{*}", "ln_vision.{*}", "qformer.{*}", "projection.{*}")
_OWN_LORA = tuple(f"llm.blocks.{{}}.{{*}}.lora_{ab}" for ab in "ab")
OWN = Table(
    "this project's weights",
    [Rule("vit.pos", "vit.pos", POSITIONS), *(Rule(name, name) for name in _OWN + _OWN_LORA)],
)
