"""Hugging Face directories of small BLIP-2 and InstructBLIP models: all tensors are random."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import chat_families
from helpers.paths import TOKENIZER

SIZE, QUERIES, WORDS = 28, 3, 40
TEXTS = {
    "opt": {
        "model_type": "opt", "vocab_size": 420, "hidden_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "ffn_dim": 24, "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
    },
    "llama": {
        "model_type": "llama", "vocab_size": 800, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
    "t5": {
        "model_type": "t5", "vocab_size": 420, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 1,
        "num_decoder_layers": 1, "num_heads": 2, "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu", "is_gated_act": True, "tie_word_embeddings": False,
        "decoder_start_token_id": 0, "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 20, "layer_norm_epsilon": 1e-5,
    },
}  # fmt: skip
# kind of model -> variant, transformers' class, language model, whether its Q-Former reads text
KINDS = {
    "opt": ("blip2-opt", "Blip2ForConditionalGeneration", "opt", False),
    "flant5": ("blip2-flant5", "Blip2ForConditionalGeneration", "t5", False),
    "instruct": ("instructblip-vicuna", "InstructBlipForConditionalGeneration", "llama", True),
    "matching": ("blip2-qformer", "Blip2ForImageTextRetrieval", "opt", True),
}
REMOVED = object()


def config_of(kind: str) -> dict[str, Any]:
    """config.json of a small model; all fields of the parts are written."""
    import transformers

    _, architecture, text, reads_text = KINDS[kind]
    model_type = "instructblip" if kind == "instruct" else "blip-2"
    config = transformers.AutoConfig.for_model(
        model_type,
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": SIZE,
        },
        qformer_config={
            "vocab_size": WORDS + 1, "hidden_size": 20, "num_hidden_layers": 3,
            "num_attention_heads": 2, "intermediate_size": 28, "max_position_embeddings": 16,
            **({"use_qformer_text_input": reads_text} if kind != "instruct" else {}),
        },
        text_config=TEXTS[text], num_query_tokens=QUERIES,
        **({} if kind == "instruct" else {"image_text_hidden_size": 12}),
    ).to_dict()  # fmt: skip
    if text == "t5":  # as FlanT5 says it; transformers 5 writes it in another way
        del config["text_config"]["scale_decoder_outputs"]
        config["text_config"] |= TEXTS[text]
    return json.loads(json.dumps(config)) | {"architectures": [architecture]}


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with another value of a field, as `text_config.eos_token_id`, or without it (REMOVED)."""
    config = copy.deepcopy(config)
    *parts, name = path.split(".")
    part = config[parts[0]] if parts else config
    if value is REMOVED:
        part.pop(name, None)
    else:
        part[name] = value
    return config


def write_tensors(kind: str, config: dict[str, Any], folder: Path) -> None:
    """Everything of a directory but config.json."""
    import transformers

    save_file = pytest.importorskip("safetensors.numpy").save_file
    model_class = getattr(transformers, KINDS[kind][1])
    model = model_class(transformers.AutoConfig.for_model(**copy.deepcopy(config)))
    rng = np.random.default_rng(0)
    # what is the same tensor under another name
    second = {
        "instruct": ("position_ids",), "flant5": ("position_ids", "coder.embed_tokens.weight"),
    }.get(kind, ("position_ids", "lm_head.weight"))  # fmt: skip
    state = {}
    for name, tensor in model.state_dict().items():
        array = rng.normal(0, 0.3, tensor.shape).astype(np.float32)
        array += "norm" in name.lower() and name.endswith("weight")
        if name.endswith("qkv.bias"):  # keys have none
            array[16:32] = 0
        if not name.endswith(second):
            state[name] = array
    save_file(state, folder / "model.safetensors")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(WORDS - 4))]
    vocabulary = folder / {"instruct": "qformer_tokenizer"}.get(kind, "")
    vocabulary.mkdir(exist_ok=True)
    (vocabulary / "vocab.txt").write_text("\n".join(words) + "\n")
    if kind == "instruct":
        shutil.copy(TOKENIZER / "tokenizer.model", folder)
    elif kind != "matching":
        chat_families.write_tokenizer(folder, chat_families.FAMILIES["zephyr"])


def with_config(folder: Path, out: Path, config: dict[str, Any]) -> Path:
    """A copy of a directory, by links, with another config.json."""
    out.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json":
            (out / path.name).symlink_to(path)
    (out / "config.json").write_text(json.dumps(config))
    return out
