"""GGUF files as llama.cpp writes them."""

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.paths import TOKENIZER

gguf = pytest.importorskip("gguf")


def permute_as_llama_cpp(w: np.ndarray, heads: int) -> np.ndarray:
    """Query or key weights as the conversion script of llama.cpp stores them: halves -> pairs."""
    return (
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def pieces():
    """(tokens, scores, kinds) of the small sentencepiece model, as llama.cpp lists them."""
    import sentencepiece

    m = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    ids = range(m.get_piece_size())
    kinds = [
        2 if m.is_unknown(i) else 3 if m.is_control(i) else 6 if m.is_byte(i) else 1 for i in ids
    ]
    return [m.id_to_piece(i) for i in ids], [m.get_score(i) for i in ids], kinds


def add_directory_tokenizer(w, folder: Path) -> None:
    """The tokenizer of a Hugging Face directory, as llama.cpp's conversion script stores it."""
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained(str(folder))
    # CONTROL or USER_DEFINED
    added_kinds = {i: 3 if a.special else 4 for i, a in t.added_tokens_decoder.items()}
    if (folder / "tokenizer.model").is_file():
        tokens, scores, kinds = pieces()
        added = [t.convert_ids_to_tokens(i) for i in range(len(tokens), len(t))]
        w.add_tokenizer_model("llama")
        w.add_token_list(tokens + added)
        w.add_token_scores(scores + [0.0] * len(added))
        w.add_token_types(kinds + [added_kinds[len(tokens) + i] for i in range(len(added))])
        if not json.loads((folder / "tokenizer_config.json").read_text()).get(
            "add_prefix_space", 1
        ):
            w.add_add_space_prefix(False)
    else:
        tokens = t.convert_ids_to_tokens(range(len(t)))
        merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
        w.add_tokenizer_model("gpt2")
        w.add_tokenizer_pre("gpt-2")
        w.add_token_list(tokens)
        w.add_token_types([added_kinds.get(i, 1) for i in range(len(tokens))])
        w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    if t.bos_token_id is not None:
        w.add_bos_token_id(t.bos_token_id)
    w.add_eos_token_id(t.eos_token_id)
    w.add_add_bos_token(t.encode("a")[:1] == [t.bos_token_id])
    if t.chat_template:
        w.add_chat_template(t.chat_template)


def write_gguf(
    path: Path, config: dict, state: dict, arch="llama", quantize=None, extra=None, drop=(),
    tokenizer: Path | None = None,
):  # fmt: skip
    """Write a Hugging Face model as llama.cpp's conversion script does.

    quantize: a type, or a function from a tensor's name to one. drop: tensors to leave out, or
    "tokenizer". tokenizer: a directory, instead of the small sentencepiece model.
    """
    w = gguf.GGUFWriter(path, arch)
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config.get("rope_theta", 10000.0))
    tokens, scores, kinds = pieces()
    if tokenizer is not None:
        add_directory_tokenizer(w, tokenizer)
    elif "tokenizer" not in drop:
        w.add_tokenizer_model("llama")
        w.add_token_list(tokens)
        w.add_token_scores(scores)
        w.add_token_types(kinds)
        w.add_bos_token_id(1)
        w.add_eos_token_id(2)
    for name, x in (extra or {}).items():
        w.add_tensor(name, x)
    for key, x in state.items():
        if "inv_freq" in key or key in drop:
            continue
        stem, _, last = key.rpartition(".")
        layer = ""
        if stem.startswith("model.layers."):
            _, _, n, stem = stem.split(".", 3)
            layer = f"blk.{n}."
        name = f"{layer}{NAMES[stem]}.{last}"
        if arch == "llama" and NAMES[stem] in ("attn_q", "attn_k"):
            x = permute_as_llama_cpp(x, heads if NAMES[stem] == "attn_q" else kv)
        kind = quantize(name) if callable(quantize) else quantize
        if kind is not None and x.ndim == 2 and x.shape[1] % 32 == 0:
            raw = gguf.quants.quantize(x.astype(np.float32), kind)
            w.add_tensor(name, raw, raw_dtype=kind)
        else:
            w.add_tensor(name, x)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
