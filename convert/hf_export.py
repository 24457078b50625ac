"""python -m convert export --format=huggingface: a BLIP-2 model as a directory that transformers loads.

All tensors keep their stored dtype. The finished directory is opened as `convert build` would, before it
appears: it must give the same model again.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.blip2_keys import HF_ITM, HF_QKV_BIAS, hf_table
from convert.blip2_plan import make_blip2_plan
from convert.build_plan import BuildRequest
from convert.export import original_shape
from convert.formats.safetensors_writer import StreamedTensor, split_shards, write_safetensors
from convert.hf_export_config import (
    generation_values,
    model_values,
    preprocessor_values,
    processor_values,
)
from convert.hf_export_tokenizer import choose_image_token, end_ids, write_json, write_tokenizer
from convert.key_mapping import original_key
from convert.output import check_apart, check_output, check_space, combined_sources
from minigpt4_jax.checkpoint.finite_tensors import FiniteTensors
from minigpt4_jax.checkpoint.model_directory import (
    ReadableTensors,
    Tensors,
    model_chain,
    read_config,
    tokenizer_dir,
)
from minigpt4_jax.checkpoint.parameters import check_shapes, parameter_shapes
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import atomic_directory, write_error
from minigpt4_jax.storage.paths import parse_local_path, parse_path
from minigpt4_jax.storage.safetensors_header import DTYPES

VARIANTS = ("blip2-opt", "blip2-flant5", "blip2-qformer")
SHARD_BYTES = 5_000_000_000  # of a file, as save_pretrained splits them
# what transformers' image-text model does not have
_STAGE1_ONLY = {
    "qformer.temperature": "the temperature of the contrastive loss",
    "qformer.lm_head.": "the head that writes captions",
}


def export_huggingface(
    model_dir: Path,
    out: Path,
    *,
    base: Path | None = None,
    allow_nonfinite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write a directory for Blip2ForConditionalGeneration or Blip2ForImageTextRetrieval, atomically.
    Returns the keys.

    base: the directory of the model's base, if that is no longer where model.json says.
    UserError: transformers has no such model, the model is quantized or has LoRA, a directory is missing or
    damaged, values are NaN or infinite (unless allow_nonfinite), or `out` exists, is in a directory
    of the model, or cannot be written.
    """
    model_dir, out = parse_path("model directory", model_dir), parse_local_path("--out", out)
    config = read_config(model_dir)
    _refuse_other_models(model_dir, config)
    chain = model_chain(model_dir, base)
    check_apart(out, chain)
    parent = check_output(out)
    stored = Tensors(model_dir, base)
    shapes = {name: stored.shape(name) for name in stored}
    check_shapes(shapes, parameter_shapes(config), model_dir)
    readable = stored if allow_nonfinite else FiniteTensors(stored, model_dir)
    tensors, left_out = streamed_tensors(config, stored, readable)
    size = sum(t.nbytes for t in tensors.values())
    check_space(parent, size)
    dtype, notes = _dtype(tensors)
    if left_out:
        notes.append(
            f"left out, as transformers' image-text model has no place for it: {', '.join(left_out)}"
        )
    if config.llm.encoder_layers and config.llm.tie:
        notes.append(
            "the embedding is the output matrix too, as transformers 5 writes FlanT5; transformers 4 reads "
            "that as T5 1.0, with other logits"
        )
    try:
        with atomic_directory(out, "config.json") as directory:
            write_tokenizer(directory.path, tokenizer_dir(model_dir, base), config)
            notes += _write_configs(directory.path, chain, config, dtype)
            _write_weights(directory.path, tensors, size, shard_bytes)
            notes += _check_again(directory.path, out, config)
    except OSError as e:
        raise write_error(out, e, "nothing was written") from e
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {out}: {len(tensors):,} tensors, {size / 1e9:.2f} GB")
    return list(tensors)


def _refuse_other_models(model_dir: Path, config: ModelConfig) -> None:
    """UserError: a model that has no class in transformers, or weights that such a class cannot hold."""
    if config.variant not in VARIANTS:
        raise UserError(
            f"--format=huggingface: {model_dir} is {config.variant}; expected {', '.join(VARIANTS)} "
            "(--format=pth writes what was trained)"
        )
    if config.quantize is not None:
        raise UserError(
            f"--format=huggingface: {model_dir} is quantized to {config.quantize}, which transformers' "
            "classes do not read: export the model it was made from"
        )
    if config.lora is not None:
        raise UserError(
            f"--format=huggingface: {model_dir} has LoRA, which transformers' classes do not have: add it "
            f"to the weights first (python -m convert merge --model={model_dir} --out=NEW)"
        )


# --- weights --------------------------------------------------------------------------------------


def streamed_tensors(
    config: ModelConfig, stored: Tensors, readable: ReadableTensors
) -> tuple[dict[str, StreamedTensor], list[str]]:
    """(key -> tensor of transformers' class, descriptions of what it has no place for).

    readable: the tensors of `stored`, perhaps checked as they are read.
    """
    table = HF_ITM if config.is_stage1 else hf_table(config.llm.model_type)
    tensors: dict[str, StreamedTensor] = {}
    left_out: list[str] = []
    for name in sorted(stored):
        key = original_key(table, name)
        if key is None:
            what = next((text for p, text in _STAGE1_ONLY.items() if name.startswith(p)), name)
            if what not in left_out:
                left_out.append(what)
        elif HF_QKV_BIAS in key:  # .q and .v of one bias
            fused = key.rpartition(".")[0]
            if fused not in tensors:
                tensors[fused] = _fused_bias(name.removesuffix("_bias")[:-1], stored, readable)
        else:
            shape = original_shape(name, stored.shape(name), config)
            tensors[key] = StreamedTensor(
                stored.dtype(name), shape, _reshaped(readable, name, shape)
            )
    return tensors, left_out


def _reshaped(
    readable: ReadableTensors, name: str, shape: tuple[int, ...]
) -> Callable[[], np.ndarray]:
    return lambda: readable[name].reshape(shape)


def _fused_bias(stem: str, stored: Tensors, readable: ReadableTensors) -> StreamedTensor:
    """The biases of queries, keys (zeros) and values, [3 D], in the wider of their dtypes."""
    names = [f"{stem}q_bias", f"{stem}v_bias"]
    dtype = max((stored.dtype(n) for n in names), key=lambda d: DTYPES[d].itemsize)
    (width,) = stored.shape(names[0])

    def load() -> np.ndarray:
        q, v = (readable[n].astype(DTYPES[dtype]) for n in names)
        return np.concatenate([q, np.zeros_like(q), v])

    return StreamedTensor(dtype, (3 * width,), load)


def _dtype(tensors: Mapping[str, StreamedTensor]) -> tuple[str, list[str]]:
    """(the dtype of config.json, notes): that of all tensors, or float32, which holds all of them."""
    found = sorted({DTYPES[t.dtype].name for t in tensors.values()})
    if len(found) == 1:
        return found[0], []
    note = (
        f"tensors are {' and '.join(found)}, so config.json says float32, in which transformers loads all "
        "of them; from_pretrained(dtype=...) chooses another"
    )
    return "float32", [note]


def _write_weights(
    directory: Path, tensors: Mapping[str, StreamedTensor], size: int, shard_bytes: int
) -> None:
    """model.safetensors, or shards and their index."""
    from tqdm import tqdm

    shards = split_shards(tensors, shard_bytes)
    files: dict[str, str] = {}
    with tqdm(total=size, unit="B", unit_scale=True, desc="exporting", disable=None) as bar:
        for i, shard in enumerate(shards, 1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(directory / name, shard, bar.update)
            files |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
        write_json(directory / "model.safetensors.index.json", index)


# --- configuration --------------------------------------------------------------------------------


def _write_configs(
    directory: Path, chain: list[Path], config: ModelConfig, dtype: str
) -> list[str]:
    """config.json and the files of generation and of the processor. Returns notes."""
    recorded = combined_sources(chain).get("checkpoint") or {}
    image_token: int | None = recorded.get("image_token_index")
    ends: list[int] = []
    notes: list[str] = []
    if not config.is_stage1:
        image_token = choose_image_token(directory, config.llm.vocab, image_token, notes)
        ends = end_ids(directory, config, notes)
    files = {
        "config.json": model_values(config, dtype, image_token, ends),
        "preprocessor_config.json": preprocessor_values(config),
        "processor_config.json": processor_values(config, image_token),
    }
    if ends:
        files["generation_config.json"] = generation_values(config, ends)
    for name, values in files.items():
        write_json(directory / name, values)
    return notes


def _check_again(directory: Path, out: Path, config: ModelConfig) -> list[str]:
    """Open the written directory as `convert build` would. Returns notes about values that are lost.

    UserError: it would be another model.
    """
    try:
        plan = make_blip2_plan(BuildRequest(config.variant, None, out, checkpoint=directory))
    except UserError as e:
        raise UserError(str(e).replace(str(directory), str(out))) from None
    ours, again = _flat(config.to_dict()), _flat(plan.config.to_dict())
    if config.is_stage1:  # the head and the temperature, which are named
        again["qformer.lm_head"] = ours["qformer.lm_head"]
    notes = []
    for key, value in ours.items():
        if value == again.get(key):
            continue
        if key.startswith(("vision.", "qformer.", "llm.")):
            raise UserError(
                f"--format=huggingface: {key} is {value!r}, and transformers' classes have "
                f"{again.get(key)!r}: this model has no directory in that format"
            )
        notes.append(
            f"{key} is {value!r}, which the directory does not record: `convert build` gives "
            f"{again.get(key)!r} unless --set says otherwise"
        )
    return notes


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
