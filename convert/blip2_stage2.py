"""Plans the build of BLIP-2 with a language model, OPT or FlanT5, and of InstructBLIP."""

import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from convert.blip2_config import hf_values
from convert.blip2_keys import (
    LAVIS_TABLES,
    STAGE1,
    hf_table,
)
from convert.blip2_parts import combine_sources, finish_plan, open_vision, vision_values
from convert.blip2_sources import is_hf_blip2, open_hf, open_lavis
from convert.build_plan import BuildPlan, BuildRequest
from convert.end_tokens import other_end_ids, text_config_end_ids
from convert.formats.readers import read_json
from convert.infer_config import qformer_config, text_config
from convert.instructblip import (
    CAPTION_PROMPT,
    MAX_TEXT_LENGTH,
    check_options,
    is_instructblip,
    qformer_vocabulary,
)
from convert.key_mapping import BLIP2, NATIVE
from convert.language_model import TokenizerFiles, find_tokenizer, open_llm
from convert.llm_config import llm_config, resolve_tied_embeddings
from convert.overrides import apply_settings, parse_settings
from convert.sources import MappedCheckpoint, llm_checkpoint
from convert.validate import check_tokens
from minigpt4_jax.config import ModelConfig, TokenizerConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.tokenizer import Tokenizer, load_tokenizer

_MODEL_TYPES = {
    "blip2-opt": "opt", "blip2-flant5": "t5", "instructblip-vicuna": "llama",
    "instructblip-flant5": "t5",
}  # fmt: skip
_OPT_END = "\n"  # closes the answers that BLIP-2 with OPT was trained with
_EXAMPLES = {
    "opt": "facebook/opt-2.7b", "t5": "google/flan-t5-xl", "llama": "lmsys/vicuna-7b-v1.1"
}  # fmt: skip


def plan_stage2(request: BuildRequest) -> BuildPlan:
    """As `make_blip2_plan`, for a variant with a language model."""
    settings, notes = parse_settings(request.settings), list[str]()
    instructed = is_instructblip(request.variant)
    if instructed:
        check_options(request)
    checkpoints = open_vision(request)
    if request.qformer is not None:
        checkpoints.append(_open_qformer(request.qformer))
    if request.checkpoint is not None and is_hf_blip2(request.checkpoint):
        llm, whole, ends = _open_hf_model(request, notes)
        folder = request.checkpoint if instructed else request.tokenizer or request.checkpoint
        tokenizer = TokenizerFiles(find_tokenizer(folder), str(folder))
        checkpoints.append(whole)
    else:
        llm, of_llm, tokenizer, ends = _open_language_model(request, notes)
        checkpoints.append(of_llm)
        if request.checkpoint is not None:
            tables = (LAVIS_TABLES[request.variant], NATIVE)
            checkpoints.append(open_lavis("--checkpoint", request.checkpoint, tables))
    sources = combine_sources(checkpoints)
    files = _load_tokenizer(tokenizer)
    ids = TokenizerConfig(
        files.kind, files.bos_id, files.eos_id, files.pad_id,
        end_ids=_end_ids(request, ends, files, notes),
    )  # fmt: skip
    if request.variant == "instructblip-vicuna":  # LAVIS makes `</s>` Vicuna's BOS
        ids = replace(ids, bos_id=files.eos_id)
    values: dict[str, Any] = {
        "variant": request.variant,
        "vision": vision_values(checkpoints, sources, settings),
        "qformer": _qformer_values(request, checkpoints, settings),
        "llm": llm,
        "max_text_length": 32,
        "image_first": True,
        "ends_at_eos": request.variant != "blip2-opt",
        "prompt_template": "Question: {} Answer:",
        "chat_template": "blip2",
        "end_symbol": _OPT_END if request.variant == "blip2-opt" else "</s>",
        "tokenizer": asdict(ids),
    }
    if instructed:
        values |= {
            "prompt_template": "{}", "chat_template": "training", "max_text_length": MAX_TEXT_LENGTH,
            "caption_prompt": CAPTION_PROMPT,
        }  # fmt: skip
    for name in apply_settings(values, settings):
        notes.append(f"--set {name} is not used: {request.variant} has no such part")
    config = ModelConfig.from_dict(values).check()
    check_tokens(config.llm.vocab, files.vocab_size, checkpoints[-1].label)
    if instructed:
        of_qformer = qformer_vocabulary(request, config.qformer)
        tokenizer = TokenizerFiles({**tokenizer.files, **of_qformer}, tokenizer.origin)
    new = "projection" if request.checkpoint is None else ""
    return finish_plan(request, config, checkpoints, sources, tokenizer, new, notes)


def _open_qformer(path: Path) -> MappedCheckpoint:
    """--qformer, without its text branch."""
    checkpoint = open_lavis("--qformer", path, (STAGE1, BLIP2, NATIVE))
    text = (
        "text_mlp", "embed", "positions", "temperature", "itm_head", "lm_head", "vision_projection",
        "text_projection",
    )  # fmt: skip
    checkpoint.mapped = {
        name: key
        for name, key in checkpoint.mapped.items()
        if name.startswith(("qformer.", "ln_vision.", "vit."))
        and not any(f".{part}" in name for part in text)
    }
    checkpoint.table = BLIP2 if checkpoint.table.name == STAGE1.name else checkpoint.table
    return checkpoint


def _open_hf_model(
    request: BuildRequest, notes: list[str]
) -> tuple[dict[str, Any], MappedCheckpoint, tuple[int, ...] | None]:
    """(LlmConfig fields, the whole model, the tokens at which transformers ends an answer) of a Hugging
    Face directory."""
    assert request.checkpoint is not None
    if request.llm is not None:
        raise UserError("--llm is given, but --checkpoint is a Hugging Face directory with its own")
    label = str(request.checkpoint / "config.json")
    whole_config = read_json(request.checkpoint / "config.json")
    instructed = is_instructblip(request.variant)
    if (whole_config["model_type"] == "instructblip") != instructed:
        raise UserError(
            f"{label}: model_type is {whole_config['model_type']!r}, but --variant is {request.variant}; "
            f"choose {'a blip2' if instructed else 'an instructblip'} variant"
        )
    whole_values = hf_values(whole_config, label, notes, reads_text=instructed)
    values, label = whole_values["text_config"], f"{label}: text_config"
    _check_model_type(request, values.get("model_type"), label)
    whole = hf_table(values.get("model_type"), instructed=instructed)
    checkpoint = open_hf("--checkpoint", request.checkpoint, whole, whole_values, notes)
    llm = asdict(llm_config(values, label, notes))
    resolve_tied_embeddings(llm, checkpoint, notes)
    return llm, checkpoint, text_config_end_ids(values, request.checkpoint, notes)


def _open_language_model(
    request: BuildRequest, notes: list[str]
) -> tuple[dict[str, Any], MappedCheckpoint, TokenizerFiles, tuple[int, ...] | None]:
    """(LlmConfig fields, weights, tokenizer, the tokens at which its files end an answer) of --llm. The last
    are None if nothing says them, or LAVIS does not use them, as with OPT."""
    if request.llm is None:
        raise UserError(
            f"{request.variant} needs --llm=PATH, its language model (for instance "
            f"{_EXAMPLES[_MODEL_TYPES[request.variant]]}), or --checkpoint=DIR in Hugging Face's layout"
        )
    instructed = is_instructblip(request.variant)  # its --tokenizer is the Q-Former's
    tokenizer = None if instructed else request.tokenizer
    language = open_llm(request.llm, request.llm_delta, tokenizer)
    _check_model_type(request, language.config.get("model_type"), language.config_label)
    checkpoint = llm_checkpoint(language)
    llm = asdict(llm_config(language.config, language.config_label, notes))
    resolve_tied_embeddings(llm, checkpoint, notes)
    if llm["activation"] == "gelu_new":  # LAVIS' rule, with which BLIP-2 was trained
        llm["activation"] = "gelu"
        notes.append("FlanT5 with the exact GELU, as BLIP-2 was trained (--set llm.activation)")
    ends = None if request.variant == "blip2-opt" else language.end_ids or None
    return llm, checkpoint, TokenizerFiles(language.tokenizer, language.tokenizer_origin), ends


def _end_ids(
    request: BuildRequest, ends: tuple[int, ...] | None, tokenizer: Tokenizer, notes: list[str]
) -> tuple[int, ...]:
    """The tokens besides the variant's own end at which an answer ends. ends: where transformers ends it."""
    if ends is None:
        return ()
    text, own = "EOS", [tokenizer.eos_id]
    if request.variant == "blip2-opt":
        text, own = repr(_OPT_END), tokenizer.encode(_OPT_END)
    if len(own) != 1 or own[0] not in ends:
        named = f"name {', '.join(map(str, ends))}" if ends else "name none"
        notes.append(
            f"an answer ends at {text}, with which {request.variant} was trained, though the language "
            f"model's files {named} (eos_token_id): transformers goes on there"
        )
    return other_end_ids(ends, own[0] if len(own) == 1 else None, tokenizer, notes)


def _check_model_type(request: BuildRequest, model_type: Any, label: str) -> None:
    if model_type != _MODEL_TYPES[request.variant]:
        raise UserError(
            f"{label}: a language model of model_type {model_type!r}; {request.variant} needs "
            f"{_MODEL_TYPES[request.variant]!r}"
        )


def _qformer_values(
    request: BuildRequest, checkpoints: list[MappedCheckpoint], settings: dict[str, Any]
) -> dict[str, Any]:
    """QFormerConfig fields, of the last checkpoint that has a Q-Former."""
    found = [c for c in checkpoints if c.shapes("qformer.blocks.")]
    if not found:
        raise UserError(f"{request.variant} needs --checkpoint=PATH or --qformer=PATH")
    recorded = found[-1].sizes.get("qformer")
    if recorded is None:
        recorded = qformer_config(found[-1].shapes("qformer."), found[-1].label, settings)
    text = {"vocab": 0, "max_positions": 0, "itc_width": 0, "lm_head": False}
    if is_instructblip(request.variant):
        text |= text_config(found[-1].shapes("qformer."), found[-1].label)
    return {**recorded, **text}


def _load_tokenizer(files: TokenizerFiles) -> Tokenizer:
    """The tokenizer as `load` will read it: LLaMA's sentencepiece model where it is alone, as LAVIS reads it.
    UserError: it cannot be read."""
    kind = "hf" if {"tokenizer.json", "vocab.json", "spiece.model"} & set(files.files) else None
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.files.items():
            if isinstance(content, bytes):
                (Path(folder) / name).write_bytes(content)
            else:
                shutil.copyfile(content, Path(folder) / name)
        try:
            return load_tokenizer(folder, kind)
        except UserError as e:
            raise UserError(str(e).replace(folder, files.origin)) from e
