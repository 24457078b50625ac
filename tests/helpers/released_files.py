"""Small checkpoints in the formats of the released ones, made by hand: no PyTorch needed."""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from convert.export import write_torch
from helpers.paths import TOKENIZER

VOCAB = 785
CHECKPOINTS = {"minigpt4-vicuna": "a", "minigpt4-llama2": "b", "minigpt-v2": "c"}
State = dict[str, np.ndarray]


def random_state(shapes: dict[str, tuple[int, ...]], dtype=np.float32, seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(0, 0.2, s).astype(dtype) for k, s in shapes.items()}


def vit_state(width=16, blocks=3, patch=2, grid=4, mlp=24, dtype=np.float16) -> State:
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid * grid, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "head.weight": (5, width),
    }
    for i in range(blocks):
        b = f"blocks.{i}."
        for n in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[b + n] = (width,)
        for n in ("attn.q_bias", "attn.v_bias", "attn.proj.bias", "mlp.fc2.bias"):
            shapes[b + n] = (width,)
        shapes[b + "attn.qkv.weight"] = (3 * width, width)
        shapes[b + "attn.proj.weight"] = (width, width)
        shapes[b + "mlp.fc1.weight"] = (mlp, width)
        shapes[b + "mlp.fc1.bias"] = (mlp,)
        shapes[b + "mlp.fc2.weight"] = (width, mlp)
    return random_state(shapes, dtype, 1)


def blip2_state(hidden=12, layers=2, queries=3, ffn=20, vision=16) -> State:
    shapes = {
        "query_tokens": (1, queries, hidden),
        "ln_vision.weight": (vision,),
        "ln_vision.bias": (vision,),
        "t5_proj.weight": (8, hidden),
        "t5_proj.bias": (8,),
        "Qformer.bert.embeddings.LayerNorm.weight": (hidden,),
        "Qformer.bert.embeddings.LayerNorm.bias": (hidden,),
        "Qformer.bert.embeddings.word_embeddings.weight": (30, hidden),
        "Qformer.cls.predictions.bias": (30,),
    }
    for i in range(layers):
        b = f"Qformer.bert.encoder.layer.{i}."
        for kind in ("attention", "crossattention") if i % 2 == 0 else ("attention",):
            for n in ("self.query", "self.key", "self.value", "output.dense"):
                cross = kind == "crossattention" and n in ("self.key", "self.value")
                shapes[f"{b}{kind}.{n}.weight"] = (hidden, vision if cross else hidden)
                shapes[f"{b}{kind}.{n}.bias"] = (hidden,)
            shapes[f"{b}{kind}.output.LayerNorm.weight"] = (hidden,)
            shapes[f"{b}{kind}.output.LayerNorm.bias"] = (hidden,)
        shapes[b + "intermediate.dense.weight"] = (ffn, hidden)  # the text branch, unused
        shapes[b + "intermediate_query.dense.weight"] = (ffn, hidden)
        shapes[b + "intermediate_query.dense.bias"] = (ffn,)
        shapes[b + "output_query.dense.weight"] = (hidden, ffn)
        shapes[b + "output_query.dense.bias"] = (hidden,)
        shapes[b + "output_query.LayerNorm.weight"] = (hidden,)
        shapes[b + "output_query.LayerNorm.bias"] = (hidden,)
    state = random_state(shapes, np.float32, 2)
    state["Qformer.bert.embeddings.position_ids"] = np.arange(4)[None]
    return state


def llm_config(**changes) -> dict:
    return {
        "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 64, "tie_word_embeddings": False,
    } | changes  # fmt: skip


def llm_state(config: dict, dtype=np.float16, seed: int = 3) -> State:
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    h = d // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * h, config["num_key_value_heads"] * h
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for i in range(config["num_hidden_layers"]):
        b = f"model.layers.{i}."
        shapes |= {
            f"{b}self_attn.q_proj.weight": (q, d), f"{b}self_attn.k_proj.weight": (kv, d),
            f"{b}self_attn.v_proj.weight": (kv, d), f"{b}self_attn.o_proj.weight": (d, q),
            f"{b}mlp.gate_proj.weight": (f, d), f"{b}mlp.up_proj.weight": (f, d),
            f"{b}mlp.down_proj.weight": (d, f), f"{b}input_layernorm.weight": (d,),
            f"{b}post_attention_layernorm.weight": (d,),
            f"{b}self_attn.rotary_emb.inv_freq": (h // 2,),
        }  # fmt: skip
    return random_state(shapes, dtype, seed)


def lora_state(config: dict, rank=2, middle="") -> State:
    d = config["hidden_size"]
    h = d // config["num_attention_heads"]
    shapes = {}
    for i in range(config["num_hidden_layers"]):
        for n, heads in (("q", "num_attention_heads"), ("v", "num_key_value_heads")):
            b = f"llama_model.base_model.model.model.layers.{i}.self_attn.{n}_proj.lora_"
            shapes[f"{b}A.{middle}weight"] = (rank, d)
            shapes[f"{b}B.{middle}weight"] = (config[heads] * h, rank)
    return random_state(shapes, np.float32, 4)


def projection_state(n_in: int, n_out: int = 16) -> State:
    return random_state({"llama_proj.weight": (n_out, n_in), "llama_proj.bias": (n_out,)}, seed=5)


def save_pth(path: Path, state: State) -> Path:
    """A .pth with the tensors under "model", written by `convert export`; int64 tensors are left out."""
    write_torch(path, {k: partial(np.asarray, v) for k, v in state.items() if v.dtype != np.int64})
    return path


def save_hf(folder: Path, config: dict, state: State, tokenizer: bool | Path = True) -> Path:
    """A Hugging Face directory. tokenizer: the small LLaMA one, none, or that of a directory."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer:
        for path in (TOKENIZER if tokenizer is True else tokenizer).iterdir():
            shutil.copyfile(path, folder / path.name)
    return folder


def save_sharded(folder: Path, state: State, suffix: str) -> None:
    """Replace the weights file of a Hugging Face directory by two shards and an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for n, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"{stem}-{n:05d}-of-00002.{suffix}"
        shard = {k: state[k] for k in part}
        if suffix == "safetensors":
            save_file(shard, folder / file)
        else:
            save_pth(folder / file, shard)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@dataclass
class Files:
    """Small inputs of `convert build` in a folder."""

    folder: Path
    llm_config: dict
    vit: State
    blip2: State
    llm: State

    def arguments(self, variant: str, out: Path | None = None, **changes) -> list[str]:
        """Arguments of `convert build`. changes: other values of options; None leaves an option out."""
        letter = CHECKPOINTS[variant]
        options = {
            "variant": variant,
            "vision": self.folder / "eva.pth",
            "qformer": self.folder / "blip2.pth" if letter == "a" else None,
            "llm": self.folder / "llm",
            "checkpoint": self.folder / f"{letter}.pth",
            "out": out or self.folder / f"model_{letter}",
        } | changes
        heads = ["--set", "vision.heads=2"] + (["--set=qformer.heads=3"] if letter == "a" else [])
        given = [f"--{k.replace('_', '-')}={v}" for k, v in options.items() if v is not None]
        return ["build", *given, *heads]


def make_files(folder: Path) -> Files:
    """Write the inputs of all three variants."""
    config = llm_config()
    files = Files(folder, config, vit_state(), blip2_state(), llm_state(config))
    save_pth(folder / "eva.pth", files.vit)
    save_pth(folder / "blip2.pth", files.blip2)
    save_hf(folder / "llm", config, files.llm)
    buffers = {"llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    save_pth(folder / "a.pth", projection_state(12) | buffers)
    save_pth(folder / "b.pth", projection_state(64) | buffers)
    save_pth(folder / "c.pth", projection_state(64) | lora_state(config))
    return files
