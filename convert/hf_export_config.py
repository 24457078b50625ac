"""The configuration files of an exported Hugging Face directory: the inverse of what `build` reads."""

from collections.abc import Sequence
from typing import Any

from convert.hf_config import T5_MAX_LENGTH
from minigpt4_jax.config import IMAGE_MEAN, IMAGE_STD, LlmConfig, ModelConfig, QFormerConfig

_T5_POSITIONS = 512  # n_positions of FlanT5's config.json, which its models do not use
_BICUBIC = 3  # PIL's number
# BERT's sizes in the config.json of models whose Q-Former has no text branch
_BERT_WORDS, _BERT_POSITIONS = 30522, 512
PROCESSOR = "Blip2Processor"


def model_values(
    config: ModelConfig, dtype: str, image_token: int | None, ends: Sequence[int]
) -> dict[str, Any]:
    """config.json. dtype: the one transformers loads the weights in. image_token: the id of the token that
    stands for a visual token. ends: the ids that end an answer."""
    q = _qformer(config)
    kind = "Blip2ForImageTextRetrieval" if config.is_stage1 else "Blip2ForConditionalGeneration"
    values: dict[str, Any] = {
        "architectures": [kind],
        "dtype": dtype,
        "image_text_hidden_size": q.itc_width or 256,
        "image_token_index": image_token,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": "blip-2",
        "num_query_tokens": q.queries,
        "qformer_config": _qformer_values(q),
        "vision_config": _vision_values(config),
    }
    if not config.is_stage1:
        text = _t5_values if config.llm.model_type == "t5" else _opt_values
        values["text_config"] = text(config.llm) | _token_values(config, ends)
    return values


def _qformer(config: ModelConfig) -> QFormerConfig:
    assert config.qformer is not None  # all variants of BLIP-2 have one
    return config.qformer


def _vision_values(config: ModelConfig) -> dict[str, Any]:
    v = config.vision
    return {
        "attention_dropout": 0.0, "hidden_act": "gelu", "hidden_size": v.width,
        "image_size": v.image_size, "initializer_range": 1e-10, "intermediate_size": v.mlp,
        "layer_norm_eps": v.eps, "model_type": "blip_2_vision_model",
        "num_attention_heads": v.heads, "num_hidden_layers": v.depth, "patch_size": v.patch_size,
        "qkv_bias": True,
    }  # fmt: skip


def _qformer_values(q: QFormerConfig) -> dict[str, Any]:
    return {
        "attention_probs_dropout_prob": q.dropout, "cross_attention_frequency": q.cross_every,
        "encoder_hidden_size": q.vision_width, "hidden_act": "gelu",
        "hidden_dropout_prob": q.dropout, "hidden_size": q.hidden, "initializer_range": 0.02,
        "intermediate_size": q.ffn, "layer_norm_eps": q.eps,
        "max_position_embeddings": q.max_positions or _BERT_POSITIONS,
        "model_type": "blip_2_qformer", "num_attention_heads": q.heads,
        "num_hidden_layers": q.layers, "position_embedding_type": "absolute",
        "use_qformer_text_input": q.vocab > 0, "vocab_size": q.vocab or _BERT_WORDS,
    }  # fmt: skip


def _opt_values(c: LlmConfig) -> dict[str, Any]:
    return {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "_remove_final_layer_norm": False,
        "activation_function": c.activation, "do_layer_norm_before": True, "enable_bias": True,
        "ffn_dim": c.ffn, "hidden_size": c.width, "layer_norm_elementwise_affine": True,
        "max_position_embeddings": c.max_length, "num_attention_heads": c.heads,
        "num_hidden_layers": c.layers, "tie_word_embeddings": c.tie, "vocab_size": c.vocab,
        "word_embed_proj_dim": c.width,
    }  # fmt: skip


def _t5_values(c: LlmConfig) -> dict[str, Any]:
    values = {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_ff": c.ffn,
        "d_kv": c.head_dim, "d_model": c.width, "dense_act_fn": c.activation,
        "feed_forward_proj": "gated-gelu", "is_encoder_decoder": True, "is_gated_act": True,
        "layer_norm_epsilon": c.eps, "num_decoder_layers": c.layers, "num_heads": c.heads,
        "num_layers": c.encoder_layers,
        "n_positions": _T5_POSITIONS if c.max_length == T5_MAX_LENGTH else c.max_length,
        "relative_attention_max_distance": c.relative_distance,
        "relative_attention_num_buckets": c.relative_buckets, "tie_word_embeddings": c.tie,
        "vocab_size": c.vocab,
    }  # fmt: skip
    if (
        c.tie
    ):  # as transformers 5 says that the output matrix is the embedding, without T5 1.0's factor
        values["scale_decoder_outputs"] = False
    return values


def _token_values(config: ModelConfig, ends: Sequence[int]) -> dict[str, Any]:
    """The special tokens, which `generate` of transformers takes from the language model's part: there,
    all ids that end an answer."""
    end = ends[0] if len(ends) == 1 else list(ends)
    values: dict[str, Any] = {"eos_token_id": end, "pad_token_id": config.tokenizer.pad_id}
    if config.llm.encoder_layers:
        values["decoder_start_token_id"] = config.llm.start_id
    else:
        values["bos_token_id"] = config.tokenizer.bos_id
    return values


def generation_values(config: ModelConfig, ends: Sequence[int]) -> dict[str, Any]:
    """generation_config.json. ends: the ids that end an answer."""
    return _token_values(config, ends)


def preprocessor_values(config: ModelConfig) -> dict[str, Any]:
    """preprocessor_config.json."""
    side = config.vision.image_size
    return {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": IMAGE_MEAN, "image_processor_type": "BlipImageProcessor",
        "image_std": IMAGE_STD, "processor_class": PROCESSOR, "resample": _BICUBIC,
        "rescale_factor": 1 / 255, "size": {"height": side, "width": side},
    }  # fmt: skip


def processor_values(config: ModelConfig, image_token: int | None) -> dict[str, Any]:
    """processor_config.json. The processor puts a token before a text for each visual token, but where the
    model has no such token, it must put none."""
    queries = 0 if image_token is None else _qformer(config).queries
    return {"num_query_tokens": queries, "processor_class": PROCESSOR}
