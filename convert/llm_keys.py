"""Key tables of language models with other names than LLaMA's: OPT and T5."""

from convert.key_mapping import LLM, KeyTable, Rule, ignore, module_rules

_OPT_LAYER = [
    ("self_attn_layer_norm", "norm1"),
    ("final_layer_norm", "norm2"),
    ("self_attn.q_proj", "attn.q"),
    ("self_attn.k_proj", "attn.k"),
    ("self_attn.v_proj", "attn.v"),
    ("self_attn.out_proj", "attn.o"),
    ("fc1", "mlp.up"),
    ("fc2", "mlp.down"),
]
_OPT_BODY = [
    Rule("decoder.embed_tokens.weight", "llm.embed"),
    Rule("decoder.embed_positions.weight", "llm.positions"),
    *module_rules("decoder.", "llm.", [("final_layer_norm", "norm")]),
    *module_rules("decoder.layers.{}.", "llm.blocks.{}.", _OPT_LAYER),
]
OPT = KeyTable(
    "OPT",
    [
        *(r.with_prefix("model.") for r in _OPT_BODY),
        *_OPT_BODY,
        Rule("lm_head.weight", "llm.head.weight"),
    ],
)


def _t5_stack(source: str, blocks: str, modules: list[tuple[str, str]]) -> list[Rule]:
    """The rules of the encoder's or the decoder's layers."""
    names = {"q": "q", "k": "k", "v": "v", "o": "o"}
    rules = []
    for module, target in modules:
        stem = f"{source}.block.{{}}.layer.{module}"
        if target == "mlp":
            parts = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
        else:
            parts = names if "Attention" in module else {}
        for theirs, ours in parts.items():
            rules.append(Rule(f"{stem}.{theirs}.weight", f"{blocks}.{{}}.{target}.{ours}.weight"))
        if not parts:
            rules.append(Rule(f"{stem}.weight", f"{blocks}.{{}}.{target}.scale"))
    return rules


_RELATIVE = ".block.0.layer.0.SelfAttention.relative_attention_bias.weight"
T5 = KeyTable(
    "T5",
    [
        Rule("shared.weight", "llm.embed"),
        Rule("lm_head.weight", "llm.head.weight"),
        Rule("encoder" + _RELATIVE, "llm.encoder_relative"),
        Rule("decoder" + _RELATIVE, "llm.relative"),
        Rule("encoder.final_layer_norm.weight", "llm.encoder_norm.scale"),
        Rule("decoder.final_layer_norm.weight", "llm.norm.scale"),
        *_t5_stack(
            "encoder",
            "llm.encoder_blocks",
            [
                ("0.SelfAttention", "attn"),
                ("0.layer_norm", "norm1"),
                ("1.DenseReluDense", "mlp"),
                ("1.layer_norm", "norm2"),
            ],
        ),
        *_t5_stack(
            "decoder",
            "llm.blocks",
            [
                ("0.SelfAttention", "attn"),
                ("0.layer_norm", "norm1"),
                ("1.EncDecAttention", "cross"),
                ("1.layer_norm", "cross_norm"),
                ("2.DenseReluDense", "mlp"),
                ("2.layer_norm", "norm2"),
            ],
        ),
    ],
    # copies of `shared`, which all T5 models tie to it; an unused table of early T5 files
    ignore(
        r"(encoder|decoder)\.embed_tokens\.weight",
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ),
)
_TABLES = {"opt": OPT, "t5": T5}


def llm_table(model_type: str | None) -> KeyTable:
    """The names of a model type in Hugging Face files."""
    return _TABLES.get(model_type or "", LLM)
