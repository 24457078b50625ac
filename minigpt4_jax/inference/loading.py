"""Load a model directory, which gives a Model."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from minigpt4_jax.checkpoint.loader import DTYPES, load_model, loaded_config, model_shapes
from minigpt4_jax.checkpoint.model_directory import read_config, tokenizer_dir
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.config import KV_CACHES, ModelConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.blip2_model import Blip2Model
from minigpt4_jax.inference.instructblip_model import InstructBlipModel
from minigpt4_jax.inference.model import Model
from minigpt4_jax.inference.qformer_model import QFormerModel
from minigpt4_jax.models.lora import lora_layers
from minigpt4_jax.models.minigpt import MiniGpt
from minigpt4_jax.parallel.sharding import inference_mesh
from minigpt4_jax.processing.bert_tokenizer import QFORMER_VOCABULARY, BertTokenizer
from minigpt4_jax.processing.chat_templates import chat_format
from minigpt4_jax.processing.tokenizer import load_tokenizer
from minigpt4_jax.utils.compilation_cache import enable_compilation_cache


def load(
    model_dir: str | Path,
    dtype: str | None = None,
    *,
    quantize: str | None = None,
    merge_lora: bool = False,
    kv_cache: str | None = None,
    mesh: str | Mesh | None = None,
    base: str | Path | None = None,
    allow_nonfinite: bool = False,
    exif: bool = False,
) -> Model:
    """Load a model directory (written by `python -m convert build` or by training).

    Args:
        model_dir: a local path, gs://..., or the id of a model directory on the Hugging Face hub, such
            as "org/name" or "org/name@revision", which is downloaded into huggingface_hub's cache.
        dtype: "float32" or "bfloat16" for the large matrices. By default bfloat16, except on a CPU
            with enough memory for the model in float32.
        quantize: "int8" or "int4" quantizes the matrices of the language model and the vision encoder
            while they are read (the embedding to int8). Not needed for a directory that is
            quantized already.
        merge_lora: merge LoRA into the weights, which makes it free at inference. Exact up to rounding
            in dtype; in bfloat16 a small update may be lost.
        kv_cache: "int8" or "float8" stores keys and values in 8 bits, half the size of bfloat16. int8 is
            more exact, float8 faster on a GPU.
        mesh: devices to use: sizes such as "data:2,model:4" (two groups of devices with different
            rows of a batch, every matrix split over the four of a group; see
            minigpt4_jax/parallel/sharding.py), "auto" for all devices, or a Mesh. By default the first
            device.
        base: the model that `model_dir` was trained on, if it is no longer where model.json says;
            its fingerprint is compared.
        allow_nonfinite: load weights that are NaN or infinite too. By default they are an error.
        exif: rotate images as their EXIF orientation says, as a viewer shows a phone's photo. The
            original ignores it, and so do the published datasets with boxes.

    Compiled programs are kept on disk, in the folder that the environment variable MINIGPT4_JAX_CACHE
    names, by default ~/.cache/minigpt4_jax; "off" keeps none. A jax_compilation_cache_dir of your own
    is used instead.

    UserError: not a model directory, damaged, a missing or another base, an unknown or another
    quantization, LoRA to be merged into quantized weights, or a mesh that does not fit the devices.
    """
    loading = begin_loading(
        model_dir, dtype, quantize=quantize, merge_lora=merge_lora, kv_cache=kv_cache, mesh=mesh,
        base=base, allow_nonfinite=allow_nonfinite, exif=exif,
    )  # fmt: skip
    return loading.finish()


class Loading(NamedTuple):
    """A model whose weights are still to be read.

    model: with shapes as parameters, for a `ProgramCompiler`. With merge_lora it is not the model that
    `finish` gives.
    finish: reads the weights and returns the model with them. UserError: as `load`.
    """

    model: Model
    finish: Callable[[], Model]


def begin_loading(
    model_dir: str | Path,
    dtype: str | None = None,
    *,
    quantize: str | None = None,
    merge_lora: bool = False,
    kv_cache: str | None = None,
    mesh: str | Mesh | None = None,
    base: str | Path | None = None,
    allow_nonfinite: bool = False,
    exif: bool = False,
) -> Loading:
    """As `load`, in two steps: programs can be compiled while the second reads the weights."""
    if kv_cache not in (None, *KV_CACHES):
        expected = " or ".join(map(repr, KV_CACHES))
        raise UserError(
            f"kv_cache {kv_cache!r}: expected {expected}, or None for the model's dtype"
        )
    enable_compilation_cache()
    stored = read_config(model_dir)
    if stored.is_stage1 and kv_cache is not None:
        raise UserError(f"kv_cache {kv_cache!r}: {model_dir} has no language model")
    if isinstance(mesh, str):
        mesh = inference_mesh(mesh, stored)
    if dtype is None:
        dtype = _default_dtype(stored)
    tokenizer = load_tokenizer(tokenizer_dir(model_dir, base), stored.tokenizer.kind)
    chat_format(stored, tokenizer)  # an unknown one is an error before the weights are read
    config = loaded_config(model_dir, dtype, quantize=quantize)

    def make_model(module: MiniGpt) -> Model:
        if config.is_stage1:
            return QFormerModel(module, config, tokenizer, mesh, exif=exif)
        module.llm.cache_kind = kv_cache
        if config.reads_instruction:
            of_qformer = BertTokenizer(tokenizer_dir(model_dir, base), QFORMER_VOCABULARY)
            return InstructBlipModel(module, config, tokenizer, of_qformer, mesh, exif=exif)
        if config.image_first:
            return Blip2Model(module, config, tokenizer, mesh, exif=exif)
        return Model(module, config, tokenizer, mesh, exif=exif)

    model = make_model(model_shapes(config, DTYPES[dtype], mesh, stacked=False))

    def finish() -> Model:
        module, _ = load_model(
            model_dir, dtype, stacked=False, quantize=quantize, mesh=mesh, base=base,
            allow_nonfinite=allow_nonfinite,
        )  # fmt: skip
        if merge_lora:
            for layer in lora_layers(module):
                layer.merge()
            return make_model(module)
        model.set_module(module)
        return model

    return Loading(model, finish)


def _default_dtype(config: ModelConfig) -> str:
    if jax.default_backend() != "cpu":
        return "bfloat16"
    size = 4 * sum(math.prod(shape) for shape in parameter_shapes(config).values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "float32" if size < memory / 2 else "bfloat16"
