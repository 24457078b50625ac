"""Which key of a checkpoint becomes which parameter: one table a format, strict both ways.

A key matches exactly one rule, or is on the table's ignore list, or is reported. A `{}` in a pattern
stands for a layer number.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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
# A convolution kernel [D, 3, p, p] becomes a matrix [D, 3*p*p]; leading axes of length 1 are dropped.
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
    lambda x, want: (
        x.reshape(want) if x.shape[-2:] == want else resample_positions(x, want[0])
    ),
)


def unpermute(heads: int) -> Transform:
    """Undo llama.cpp's reordering of query and key rows: pairs (2i, 2i+1) back to halves (i, i+h/2)."""

    def apply(x: np.ndarray, want: Shape) -> np.ndarray:
        half = x.shape[0] // heads // 2
        return x.reshape(heads, half, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    return Transform(KEEP.fits, apply)


@dataclass(frozen=True)
class Rule:
    """Keys that match `pattern` become `target` (a regex replacement)."""

    pattern: re.Pattern[str]
    target: str
    transform: Transform = KEEP


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
        for rule in table.rules:
            if m := rule.pattern.fullmatch(key):
                target = m.expand(rule.target)
                if target in found:
                    raise UserError(f"{table.name}: {found[target].key} and {key} are the same parameter")
                found[target] = Match(key, rule.transform)
                break
        else:
            if not any(p.fullmatch(key) for p in table.ignored):
                unknown.append(key)
    return found, unknown


def _rules(pairs: Iterable[tuple], source: str = "", target: str = "") -> list[Rule]:
    made = []
    for key, name, *transform in pairs:
        pattern = re.escape(source) + re.escape(key).replace(r"\{\}", r"(\d+)")
        made.append(Rule(re.compile(pattern), target + name.replace("{}", r"\1"), *transform))
    return made


def _layers(source: str, target: str, pairs: Iterable[tuple[str, str]]) -> list[Rule]:
    """Rules for modules in a layer: weight and bias of each `module -> module`."""
    out = []
    for key, name in pairs:
        weight = "scale" if name.rpartition(".")[2].startswith(("norm", "q_norm", "k_norm")) else "weight"
        out.append((f"{source}{key}.weight", f"{target}{name}.{weight}"))
        out.append((f"{source}{key}.bias", f"{target}{name}.bias"))
    return _rules(out)


def _ignore(*patterns: str) -> list[re.Pattern[str]]:
    return [re.compile(p) for p in patterns]


# --- EVA-ViT-g (the original's eva_vit.py) ------------------------------------------------------

_VIT = _rules(
    [
        ("cls_token", "vit.cls", RESHAPE),
        ("pos_embed", "vit.pos", POSITIONS),
        ("patch_embed.proj.weight", "vit.patch.weight", FLATTEN),
        ("patch_embed.proj.bias", "vit.patch.bias"),
        ("blocks.{}.attn.q_bias", "vit.blocks.{}.attn.q_bias"),
        ("blocks.{}.attn.v_bias", "vit.blocks.{}.attn.v_bias"),
        ("blocks.{}.attn.qkv.weight", "vit.blocks.{}.attn.qkv.weight"),
    ]
) + _layers(
    "blocks.{}.", "vit.blocks.{}.",
    [("norm1", "norm1"), ("norm2", "norm2"), ("attn.proj", "attn.out"), ("mlp.fc1", "mlp.up"), ("mlp.fc2", "mlp.down")],
)  # fmt: skip

EVA = Table("EVA-ViT", _VIT, _ignore(r"(head|norm|fc_norm|lm_head)\.(weight|bias)", "mask_token"))

# --- BLIP-2 (Q-Former and ln_vision) ------------------------------------------------------------

_LN_VISION = _rules([("ln_vision.weight", "ln_vision.scale"), ("ln_vision.bias", "ln_vision.bias")])
_QFORMER = _rules([("query_tokens", "qformer.query", RESHAPE)]) + _layers(
    "Qformer.bert.", "qformer.", [("embeddings.LayerNorm", "norm")]
) + _layers(
    "Qformer.bert.encoder.layer.{}.", "qformer.blocks.{}.",
    [
        (f"{theirs}.{key}", f"{ours}.{name}")
        for theirs, ours in (("attention", "attn"), ("crossattention", "cross"))
        for key, name in (
            ("self.query", "q"), ("self.key", "k"), ("self.value", "v"),
            ("output.dense", "out"), ("output.LayerNorm", "norm"),
        )
    ]
    + [
        ("intermediate_query.dense", "mlp.up"),
        ("output_query.dense", "mlp.down"),
        ("output_query.LayerNorm", "mlp.norm"),
    ],
)  # fmt: skip
_QFORMER_TEXT = (  # the Q-Former's text branch, which MiniGPT-4 removes
    r"Qformer\.bert\.embeddings\.(position_ids|word_embeddings\.weight|position_embeddings\.weight)",
    r"Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\..*",
    r"Qformer\.cls\..*",
)

BLIP2 = Table(
    "BLIP-2",
    _QFORMER + _LN_VISION,
    _ignore(*_QFORMER_TEXT, r"(t5|opt)_proj\.(weight|bias)", r"(vision|text)_proj\..*", r"itm_head\..*", "temp"),
)  # fmt: skip

# --- language models in the Hugging Face layout (LLaMA, Vicuna, Mistral, Qwen, SmolLM2) ----------


def _optional_model(rules: list[Rule]) -> list[Rule]:
    return [Rule(re.compile(r"(?:model\.)?" + r.pattern.pattern), r.target, r.transform) for r in rules]


_LLM_LAYER = [
    ("input_layernorm", "norm1"), ("post_attention_layernorm", "norm2"),
    ("self_attn.q_proj", "attn.q"), ("self_attn.k_proj", "attn.k"), ("self_attn.v_proj", "attn.v"),
    ("self_attn.o_proj", "attn.o"), ("self_attn.q_norm", "attn.q_norm"), ("self_attn.k_norm", "attn.k_norm"),
    ("mlp.gate_proj", "mlp.gate"), ("mlp.up_proj", "mlp.up"), ("mlp.down_proj", "mlp.down"),
]  # fmt: skip
_ROTARY = r"(.*\.)?rotary_emb\.inv_freq"

LLM = Table(
    "language model",
    _optional_model(
        _rules([("embed_tokens.weight", "llm.embed"), ("norm.weight", "llm.norm.scale")])
        + _layers("layers.{}.", "llm.blocks.{}.", _LLM_LAYER)
    )
    + _rules([("lm_head.weight", "llm.head.weight")]),
    _ignore(_ROTARY),
)


def gguf_table(heads: int, kv_heads: int, permuted: bool) -> Table:
    """llama.cpp's names. permuted: query and key rows are reordered (its "llama" architecture only)."""
    layer = [
        ("attn_norm", "norm1"), ("ffn_norm", "norm2"), ("attn_q", "attn.q"), ("attn_k", "attn.k"),
        ("attn_v", "attn.v"), ("attn_output", "attn.o"), ("attn_q_norm", "attn.q_norm"),
        ("attn_k_norm", "attn.k_norm"), ("ffn_gate", "mlp.gate"), ("ffn_up", "mlp.up"), ("ffn_down", "mlp.down"),
    ]  # fmt: skip
    rules = _rules(
        [
            ("token_embd.weight", "llm.embed"),
            ("output_norm.weight", "llm.norm.scale"),
            ("output.weight", "llm.head.weight"),
        ]
    ) + _layers("blk.{}.", "llm.blocks.{}.", layer)
    if permuted:
        by_name = {r"attn_q\.": unpermute(heads), r"attn_k\.": unpermute(kv_heads)}
        for part, transform in by_name.items():
            rules = [Rule(r.pattern, r.target, transform) if part in r.pattern.pattern else r for r in rules]
    return Table("GGUF", rules, _ignore(r"rope_freqs\.weight"))


# --- fine-tuned MiniGPT-4 checkpoints: what was not frozen --------------------------------------

_LORA = [
    Rule(
        re.compile(
            r"llama_model\.base_model\.model\.model\.layers\.(\d+)\.self_attn\.([qkvo])_proj"
            rf"\.lora_{source}\.(?:default\.)?weight"  # peft 0.2, and 0.3 on
        ),
        rf"llm.blocks.\1.attn.\2.lora_{target}",
    )
    for source, target in (("A", "a"), ("B", "b"))
]

FINE_TUNED = Table(
    "fine-tuned checkpoint",
    _layers("", "", [("llama_proj", "projection")])
    + _LORA
    + _QFORMER
    + _LN_VISION
    + [Rule(re.compile(r"visual_encoder\." + r.pattern.pattern), r.target, r.transform) for r in _VIT],
    _ignore(r"llama_model\." + _ROTARY, *_QFORMER_TEXT),
)

# --- this project's own files -------------------------------------------------------------------

OWN = Table(
    "this project's weights",
    [
        Rule(re.compile(r"vit\.pos"), "vit.pos", POSITIONS),
        Rule(re.compile(r"((vit|qformer|ln_vision|projection)\..*)"), r"\1"),
    ],
)
