"""Inputs of `build` that are given by their Hugging Face ids, downloaded."""

from dataclasses import replace
from pathlib import Path

from convert.build_plan import BuildRequest
from convert.image_processor import PROCESSOR_FILES
from convert.instructblip import QFORMER_FILES
from convert.language_model import TOKENIZER_FILES
from minigpt4_jax.config import BLIP2_VARIANTS
from minigpt4_jax.storage.hub import fetch_checkpoint, fetch_language_model, fetch_tokenizer


def download_inputs(request: BuildRequest) -> BuildRequest:
    """The request with local paths only. UserError: an id cannot be downloaded."""
    llm = request.llm
    if llm is not None:
        llm = fetch_language_model("--llm", llm, TOKENIZER_FILES)
    delta, tokenizer = request.llm_delta, request.tokenizer
    if delta is not None:
        delta = fetch_language_model("--llm-delta", delta, TOKENIZER_FILES)
    if tokenizer is not None:
        tokenizer = fetch_tokenizer("--tokenizer", tokenizer, TOKENIZER_FILES)
    # of BLIP-2 there are directories as transformers writes them
    whole: tuple[str, ...] = ()
    if request.variant in BLIP2_VARIANTS:
        whole = (*TOKENIZER_FILES, *QFORMER_FILES, *PROCESSOR_FILES)
    return replace(
        request,
        llm=llm,
        llm_delta=delta,
        tokenizer=tokenizer,
        vision=_checkpoint("--vision", request.vision),
        qformer=_checkpoint("--qformer", request.qformer, whole),
        checkpoint=_checkpoint("--checkpoint", request.checkpoint, whole),
    )


def _checkpoint(option: str, path: Path | None, whole: tuple[str, ...] = ()) -> Path | None:
    return None if path is None else fetch_checkpoint(option, path, whole)
