"""Key tables of BLIP-2: LAVIS' files of both stages, Hugging Face directories, and BERT."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from convert.key_mapping import (
    FLATTEN,
    LN_VISION_RULES,
    QFORMER_RULES,
    RESAMPLE,
    RESHAPE,
    VIT_RULES,
    KeyTable,
    Rule,
    Transform,
    ignore,
    module_rules,
)
from convert.llm_keys import llm_table


@dataclass
class Blip2Table(KeyTable):
    """A table of keys. second_names: keys that hold the tensor of another parameter once more, as files
    with tied weights do; they must be equal to it."""

    second_names: list[Rule] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ignored = [*self.ignored, *(rule.pattern for rule in self.second_names)]


# A scalar becomes a vector of one element.
SCALAR = Transform(
    lambda source, target: source == () and target == (1,), lambda x, target: x.reshape(target)
)
_LAYER = "Qformer.bert.encoder.layer.{}."
_TEXT_RULES = [
    Rule("Qformer.bert.embeddings.word_embeddings.weight", "qformer.embed"),
    Rule("Qformer.bert.embeddings.position_embeddings.weight", "qformer.positions"),
    *module_rules(
        _LAYER,
        "qformer.blocks.{}.text_mlp.",
        [
            ("intermediate.dense", "up"),
            ("output.dense", "down"),
            ("output.LayerNorm", "norm"),
        ],
    ),
]
_HEAD_RULES = [
    Rule("temp", "qformer.temperature", SCALAR),
    *module_rules(
        "",
        "qformer.",
        [
            ("vision_proj", "vision_projection"),
            ("text_proj", "text_projection"),
            ("itm_head", "itm_head"),
        ],
    ),
    *module_rules(
        "Qformer.cls.predictions.transform.",
        "qformer.lm_head.",
        [("dense", "dense"), ("LayerNorm", "norm")],
    ),
    Rule("Qformer.cls.predictions.bias", "qformer.lm_head.bias"),
]
_VISION_RULES = [rule.with_prefix("visual_encoder.") for rule in VIT_RULES]
_POSITION_IDS = r"Qformer\.bert\.embeddings\.position_ids"

STAGE1 = Blip2Table(
    "BLIP-2, stage 1 (LAVIS)",
    [*QFORMER_RULES, *_TEXT_RULES, *_HEAD_RULES, *LN_VISION_RULES, *_VISION_RULES],
    ignore(_POSITION_IDS),
    [
        Rule("Qformer.cls.predictions.decoder.weight", "qformer.embed"),
        Rule("Qformer.cls.predictions.decoder.bias", "qformer.lm_head.bias"),
    ],
)


def stage2_table(
    model: str, projection: str, embedding_names: Iterable[str], *, text: bool = False
) -> Blip2Table:
    """Stage 2, or InstructBLIP, in LAVIS' files. projection: "opt_proj", "t5_proj" or "llm_proj";
    embedding_names: second names of the language model's embedding; text: the Q-Former reads text."""
    return Blip2Table(
        f"{model} (LAVIS)",
        [
            *QFORMER_RULES,
            *(_TEXT_RULES if text else ()),
            *LN_VISION_RULES,
            *_VISION_RULES,
            *module_rules("", "", [(projection, "projection")]),
        ],
        ignore(_POSITION_IDS),
        [Rule(name, "llm.embed") for name in embedding_names],
    )


_T5_EMBEDDINGS = ["t5_model.encoder.embed_tokens.weight", "t5_model.decoder.embed_tokens.weight"]
STAGE2_OPT = stage2_table("BLIP-2 with OPT", "opt_proj", ["opt_model.lm_head.weight"])
STAGE2_T5 = stage2_table("BLIP-2 with FlanT5", "t5_proj", _T5_EMBEDDINGS)
INSTRUCT_VICUNA = stage2_table("InstructBLIP with Vicuna", "llm_proj", [], text=True)
INSTRUCT_T5 = stage2_table("InstructBLIP with FlanT5", "t5_proj", _T5_EMBEDDINGS, text=True)
# the variants whose checkpoints LAVIS writes
LAVIS_TABLES = {
    "blip2-qformer": STAGE1, "blip2-opt": STAGE2_OPT, "blip2-flant5": STAGE2_T5,
    "instructblip-vicuna": INSTRUCT_VICUNA, "instructblip-flant5": INSTRUCT_T5,
}  # fmt: skip

# --- Hugging Face ---------------------------------------------------------------------------------

_HF_VISION = "vision_model."
_HF_BLOCK = _HF_VISION + "encoder.layers.{}."
HF_QKV_BIAS = "self_attn.qkv.bias"  # queries', keys' (zero) and values' bias in one tensor
_HF_ATTENTION = [
    ("attention.query", "q"),
    ("attention.key", "k"),
    ("attention.value", "v"),
    ("output.dense", "out"),
    ("output.LayerNorm", "norm"),
]
HF_VISION_RULES = [
    Rule(_HF_VISION + "embeddings.class_embedding", "vit.cls", RESHAPE),
    Rule(_HF_VISION + "embeddings.position_embedding", "vit.pos", RESAMPLE),
    Rule(_HF_VISION + "embeddings.patch_embedding.weight", "vit.patch.weight", FLATTEN),
    Rule(_HF_VISION + "embeddings.patch_embedding.bias", "vit.patch.bias"),
    Rule(_HF_BLOCK + "self_attn.qkv.weight", "vit.blocks.{}.attn.qkv.weight"),
    Rule(_HF_BLOCK + HF_QKV_BIAS + ".q", "vit.blocks.{}.attn.q_bias"),
    Rule(_HF_BLOCK + HF_QKV_BIAS + ".v", "vit.blocks.{}.attn.v_bias"),
    *module_rules(
        _HF_BLOCK,
        "vit.blocks.{}.",
        [
            ("layer_norm1", "norm1"),
            ("layer_norm2", "norm2"),
            ("self_attn.projection", "attn.out"),
            ("mlp.fc1", "mlp.up"),
            ("mlp.fc2", "mlp.down"),
        ],
    ),
    *module_rules(_HF_VISION, "", [("post_layernorm", "ln_vision")]),
]
_HF_LAYER = "qformer.encoder.layer.{}."
_HF_QFORMER_LAYERS = [
    Rule("query_tokens", "qformer.query", RESHAPE),
    *module_rules(_HF_LAYER + "attention.", "qformer.blocks.{}.attn.", _HF_ATTENTION),
    *module_rules(_HF_LAYER + "crossattention.", "qformer.blocks.{}.cross.", _HF_ATTENTION),
    *module_rules(
        _HF_LAYER,
        "qformer.blocks.{}.mlp.",
        [
            ("intermediate_query.dense", "up"),
            ("output_query.dense", "down"),
            ("output_query.LayerNorm", "norm"),
        ],
    ),
]
_HF_TEXT_LAYERS = module_rules(
    _HF_LAYER,
    "qformer.blocks.{}.text_mlp.",
    [("intermediate.dense", "up"), ("output.dense", "down"), ("output.LayerNorm", "norm")],
)
HF_ITM = Blip2Table(
    "Hugging Face's Blip2ForImageTextRetrieval",
    [
        *HF_VISION_RULES,
        *_HF_QFORMER_LAYERS,
        *_HF_TEXT_LAYERS,
        *module_rules("", "qformer.", [("qformer.layernorm", "norm")]),
        Rule("embeddings.word_embeddings.weight", "qformer.embed"),
        Rule("embeddings.position_embeddings.weight", "qformer.positions"),
        *module_rules(
            "",
            "qformer.",
            [
                ("vision_projection", "vision_projection"),
                ("text_projection", "text_projection"),
                ("itm_head", "itm_head"),
            ],
        ),
    ],
    ignore(r"embeddings\.position_ids"),
)
HF_STAGE2_RULES = [
    *HF_VISION_RULES,
    *_HF_QFORMER_LAYERS,
    *module_rules("", "qformer.", [("qformer.layernorm", "norm")]),
    *module_rules("", "", [("language_projection", "projection")]),
]
HF_INSTRUCT_RULES = [
    *HF_VISION_RULES,
    *_HF_QFORMER_LAYERS,
    *_HF_TEXT_LAYERS,
    Rule("qformer.embeddings.word_embeddings.weight", "qformer.embed"),
    Rule("qformer.embeddings.position_embeddings.weight", "qformer.positions"),
    *module_rules("", "qformer.", [("qformer.embeddings.layernorm", "norm")]),
    *module_rules("", "", [("language_projection", "projection")]),
]


def hf_table(model_type: str | None, *, instructed: bool = False) -> Blip2Table:
    """Keys of a Hugging Face model with a language model of a type. instructed: InstructBLIP."""
    llm = llm_table(model_type)
    name = f"Hugging Face's {'InstructBlip' if instructed else 'Blip2'}ForConditionalGeneration"
    rules = [rule.with_prefix("language_model.") for rule in llm.rules]
    ignored = ignore(*(rf"language_model\.({p.pattern})" for p in llm.ignored))
    return Blip2Table(
        name, [*(HF_INSTRUCT_RULES if instructed else HF_STAGE2_RULES), *rules], ignored
    )


# --- BERT, where a new Q-Former starts ------------------------------------------------------------

_BERT_LAYER = "bert.encoder.layer.{}."
_BERT_NORM = [("embeddings.LayerNorm", "norm")]
BERT = Blip2Table(
    "BERT",
    [
        Rule("bert.embeddings.word_embeddings.weight", "qformer.embed"),
        Rule("bert.embeddings.position_embeddings.weight", "qformer.positions"),
        *module_rules("bert.", "qformer.", _BERT_NORM),
        *module_rules(
            _BERT_LAYER + "attention.",
            "qformer.blocks.{}.attn.",
            [
                ("self.query", "q"),
                ("self.key", "k"),
                ("self.value", "v"),
                ("output.dense", "out"),
                ("output.LayerNorm", "norm"),
            ],
        ),
        *module_rules(
            _BERT_LAYER,
            "qformer.blocks.{}.text_mlp.",
            [("intermediate.dense", "up"), ("output.dense", "down"), ("output.LayerNorm", "norm")],
        ),
        *module_rules(
            "cls.predictions.transform.",
            "qformer.lm_head.",
            [("dense", "dense"), ("LayerNorm", "norm")],
        ),
        Rule("cls.predictions.bias", "qformer.lm_head.bias"),
    ],
    ignore(
        r"bert\.pooler\..*",
        r"bert\.embeddings\.(token_type_embeddings\.weight|position_ids)",
        r"cls\.seq_relationship\..*",
        r"cls\.predictions\.decoder\.(weight|bias)",
    ),
)
