"""Model configuration: sizes, constants and prompt templates, as frozen dataclasses."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from minigpt4_jax.errors import UserError

IMAGE = -1  # token id of an image placeholder; the model replaces it by a projected visual token

# CLIP's pixel statistics, used by EVA-ViT-g and BLIP-2
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
VARIANTS = ("minigpt4-vicuna", "minigpt4-llama2", "minigpt-v2")
BLIP2_VARIANTS = (
    "blip2-qformer", "blip2-opt", "blip2-flant5", "instructblip-vicuna", "instructblip-flant5"
)  # fmt: skip
QUANTIZATIONS = ("int8", "int4")  # the schemes of quantization/schemes.py
KV_CACHES = ("int8", "float8")  # of keys and values in 8 bits: models/kv_cache.py
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # projections that can have adapters


@dataclass(frozen=True)
class VisionConfig:
    """EVA-ViT-g by default (EVA paper, table 4; as in the original, 39 of its 40 blocks)."""

    image_size: int = 224
    patch_size: int = 14
    width: int = 1408
    depth: int = 39
    heads: int = 16
    mlp: int = 6144
    eps: float = 1e-6

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class QFormerConfig:
    """BLIP-2's Q-Former: BERT-base with cross-attention to the image in every second layer.

    The text branch (vocab > 0) shares the self-attention with the queries. The heads of BLIP-2's first
    stage exist where itc_width and lm_head say so.
    """

    queries: int = 32
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ffn: int = 3072
    cross_every: int = 2
    vision_width: int = 1408
    eps: float = 1e-12
    dropout: float = 0.1  # only if it is trained (freeze_qformer=False)
    vocab: int = 0  # of the text branch; 0: queries only
    max_positions: int = 0  # of the text branch
    itc_width: int = 0  # of image-text contrastive features; 0: without them and the matching head
    # the text branch can write captions; with it the temperature of stage 1's contrastive loss
    lm_head: bool = False


@dataclass(frozen=True)
class RopeScaling:
    """Long-context scaling of the rotary frequencies: "linear" (position interpolation) or "llama3"."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_length: int = 8192


@dataclass(frozen=True)
class LlmConfig:
    """A language model. The defaults are LLaMA's; model families differ only in these fields.

    With encoder_layers (T5) an encoder reads the prompt, and the answer's decoder attends to it.
    """

    model_type: str = "llama"
    vocab: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    ffn: int = 11008
    eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie: bool = False
    window: int | None = None  # sliding attention window in tokens
    max_length: int = 2048  # context length of the training
    norm: str = "rms"  # or "layer"
    positions: str = "rotary"  # or "learned" (OPT), "relative" (T5)
    activation: str = "silu"  # a key of models.layers.ACTIVATIONS
    gated: bool = True  # the MLP has a gate
    scaled: bool = True  # attention scores are divided by sqrt(head_dim)
    encoder_layers: int = 0  # 0: the decoder itself reads the prompt
    start_id: int = 0  # the token that an answer's decoder starts with, with an encoder
    relative_buckets: int = 32  # of relative positions
    relative_distance: int = 128  # all larger distances share a bucket


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA paper): y = W x + alpha / rank * B A x on the named projections of
    every layer of the language model."""

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05  # on the adapters' input, in training
    targets: tuple[str, ...] = ("q", "v")

    def rules(self) -> list[tuple[bool, str]]:
        """(rule holds, error message) for each rule."""
        known, unknown = ", ".join(LORA_TARGETS), [t for t in self.targets if t not in LORA_TARGETS]
        return [
            (self.rank > 0, f"lora.rank {self.rank} must be positive"),
            (self.alpha > 0, f"lora.alpha {self.alpha} must be positive"),
            (0 <= self.dropout < 1, f"lora.dropout {self.dropout}: expected 0 <= dropout < 1"),
            (bool(self.targets), f"lora.targets is empty: name some of {known}"),
            (not unknown, f"lora.targets {', '.join(unknown)} unknown: expected some of {known}"),
            (
                len(set(self.targets)) == len(self.targets),
                f"lora.targets {self.targets}: duplicate target",
            ),
        ]


@dataclass(frozen=True)
class TokenizerConfig:
    """The kind of tokenizer in a model directory, and its special token ids. end_ids: tokens besides EOS
    that end an answer."""

    kind: str = "sentencepiece"  # or "hf"
    bos_id: int | None = 1
    eos_id: int = 2
    pad_id: int = 0
    chat_template: bool = False  # prompts are rendered by the tokenizer's own chat template
    end_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """A MiniGPT model. The three variants of the papers differ only in these values."""

    variant: str = "minigpt4-vicuna"
    vision: VisionConfig = field(default_factory=VisionConfig)
    qformer: QFormerConfig | None = field(default_factory=QFormerConfig)
    llm: LlmConfig = field(default_factory=LlmConfig)
    lora: LoraConfig | None = None
    merge_patches: int = 1  # consecutive patches per visual token (without Q-Former)
    prompt_template: str = "###Human: {} ###Assistant: "
    chat_template: str = "vicuna0"
    end_symbol: str = "###"
    max_text_length: int = 160
    max_context: int = 3800
    image_first: bool = False  # images come before BOS and text, without tags (BLIP-2)
    ends_at_eos: bool = True  # EOS ends an answer besides the end symbol
    caption_prompt: str = ""  # what captions began with in BLIP-2's training, as "a photo of"
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    quantize: str | None = None  # scheme of large matrices: None (floats), "int8", "int4" or "gguf"
    # "NAME FORMAT" of each matrix of the language model for the scheme "gguf" (BlockFormat)
    kept: tuple[str, ...] = ()

    @property
    def visual_tokens(self) -> int:
        """P: visual tokens per image."""
        if self.qformer is not None:
            return self.qformer.queries
        return self.vision.patches // self.merge_patches

    @property
    def is_stage1(self) -> bool:
        """Whether this is BLIP-2's first stage: a Q-Former whose text branch is the language model."""
        return self.llm.model_type == QFORMER_LLM

    @property
    def reads_instruction(self) -> bool:
        """Whether the Q-Former reads the prompt together with the image (InstructBLIP)."""
        return not self.is_stage1 and self.qformer is not None and self.qformer.vocab > 0

    @property
    def reads_in_pieces(self) -> bool:
        """Whether a prompt can be read piece by piece, or continued from one that begins alike: not by an
        encoder, nor by the Q-Former of stage 1."""
        return not self.llm.encoder_layers and not self.is_stage1

    @property
    def visual_width(self) -> int:
        """Width of a visual token as the language model reads it. In stage 1 these are the keys and
        values of a query in every layer of the Q-Former."""
        if self.is_stage1 and self.qformer is not None:
            return 2 * self.qformer.layers * self.qformer.hidden
        return self.llm.width

    @property
    def projection_in(self) -> int:
        """Width of a visual token before the projection."""
        if self.qformer is not None:
            return self.qformer.hidden
        return self.vision.width * self.merge_patches

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """The inverse of to_dict, also after a round trip through JSON. UserError: an unknown field."""
        config: ModelConfig = _build(cls, values, "config")
        return config

    def check(self) -> "ModelConfig":
        """Return self. UserError: values are invalid or contradict each other."""
        v, q, m = self.vision, self.qformer, self.llm
        rules = [
            (
                self.variant in (*VARIANTS, *BLIP2_VARIANTS),
                f"variant {self.variant!r}: expected one of {(*VARIANTS, *BLIP2_VARIANTS)}",
            ),
            (
                v.image_size % v.patch_size == 0,
                f"image_size {v.image_size} is not a multiple of the patch size {v.patch_size}",
            ),
            (
                v.width % v.heads == 0,
                f"vision.width {v.width} is not divisible by vision.heads {v.heads}",
            ),
            (
                q is None or q.hidden % q.heads == 0,
                f"qformer.hidden {q and q.hidden} is not divisible by qformer.heads {q and q.heads}",
            ),
            (
                q is None or q.vision_width == v.width,
                f"the Q-Former reads width {q and q.vision_width}, the vision encoder gives {v.width}",
            ),
            (
                q is not None or v.patches % self.merge_patches == 0,
                f"{v.patches} patches do not divide into groups of {self.merge_patches}",
            ),
            (
                m.heads % m.kv_heads == 0,
                f"llm.heads {m.heads} is not a multiple of kv_heads {m.kv_heads}",
            ),
            (
                self.quantize is None or not self.is_stage1,
                f"quantize {self.quantize!r}: a {self.variant} model cannot be quantized",
            ),
            ("{}" in self.prompt_template, f"prompt_template {self.prompt_template!r} has no {{}}"),
            (
                self.quantize in (None, *QUANTIZATIONS, "gguf"),
                f"quantize {self.quantize!r}: expected one of {', '.join(QUANTIZATIONS)}",
            ),
            (self.max_text_length > 0, f"max_text_length {self.max_text_length} must be positive"),
            *([] if self.lora is None else self.lora.rules()),
        ]
        for holds, message in rules:
            if not holds:
                raise UserError(f"model configuration: {message}")
        return self


_NESTED = {
    "vision": VisionConfig, "qformer": QFormerConfig, "llm": LlmConfig, "lora": LoraConfig,
    "tokenizer": TokenizerConfig, "rope_scaling": RopeScaling,
}  # fmt: skip


def _build(cls: type, values: dict[str, Any], where: str) -> Any:
    """A dataclass, nested ones included, from a dictionary; where: its name in error messages."""
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - names):
        raise UserError(f"{where}: unknown field {unknown[0]!r}; known are {sorted(names)}")
    arguments = {}
    for key, value in values.items():
        if key in _NESTED and isinstance(value, dict):
            value = _build(_NESTED[key], value, f"{where}.{key}")
        arguments[key] = tuple(value) if isinstance(value, list) else value
    return cls(**arguments)


QFORMER_LLM = "qformer"  # LlmConfig.model_type of a Q-Former's text branch


def text_branch(q: QFormerConfig) -> LlmConfig:
    """The language model that the text branch of a Q-Former is. Its rows begin with the queries."""
    return LlmConfig(
        model_type=QFORMER_LLM, vocab=q.vocab, width=q.hidden, layers=q.layers, heads=q.heads,
        kv_heads=q.heads, head_dim=q.hidden // q.heads, ffn=q.ffn, eps=q.eps, tie=True,
        max_length=q.queries + q.max_positions,
    )  # fmt: skip
