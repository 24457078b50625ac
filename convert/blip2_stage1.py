"""Plans the build of the model of BLIP-2's first stage, a Q-Former that reads and writes text."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from convert.blip2_config import hf_values
from convert.blip2_keys import HF_ITM, STAGE1
from convert.blip2_parts import combine_sources, finish_plan, open_vision, vision_values
from convert.blip2_sources import is_bert, is_hf_blip2, open_bert, open_hf, open_lavis
from convert.build_plan import BuildPlan, BuildRequest
from convert.formats.readers import read_json
from convert.infer_config import qformer_config, text_config
from convert.key_mapping import NATIVE
from convert.language_model import TokenizerFiles, find_tokenizer
from convert.overrides import apply_settings, parse_settings
from convert.sources import MappedCheckpoint
from minigpt4_jax.config import ModelConfig, QFormerConfig, TokenizerConfig, text_branch
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.bert_tokenizer import VOCABULARY, BertTokenizer


def plan_stage1(request: BuildRequest) -> BuildPlan:
    """As `make_blip2_plan`, for a Q-Former with a text branch and no language model."""
    for option in ("llm", "llm_delta"):
        if getattr(request, option) is not None:
            raise UserError(
                f"--{option.replace('_', '-')} is given, but {request.variant} has no language model"
            )
    settings, notes = parse_settings(request.settings), list[str]()
    checkpoints = _open_stage1(request, notes)
    tokenizer = _bert_tokenizer(request)
    sources = combine_sources(checkpoints)
    vision = vision_values(checkpoints, sources, settings)
    qformer = _stage1_qformer(checkpoints, settings)
    values: dict[str, Any] = {
        "variant": request.variant, "vision": vision, "qformer": qformer, "end_symbol": "[SEP]",
        "prompt_template": "{}", "chat_template": "training", "max_text_length": 32,
        "image_first": True,
    }  # fmt: skip
    vocabulary = BertTokenizer(Path(tokenizer.origin))
    for name in apply_settings(values, settings):
        notes.append(f"--set {name} is not used: {request.variant} has no such part")
    values["llm"] = asdict(text_branch(QFormerConfig(**values["qformer"])))
    values["tokenizer"] = asdict(
        TokenizerConfig("bert", vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
    )
    config = ModelConfig.from_dict(values).check()
    if vocabulary.vocab_size != config.llm.vocab:
        raise UserError(
            f"{tokenizer.origin}: the tokenizer has {vocabulary.vocab_size} tokens with [DEC], the "
            f"Q-Former {config.llm.vocab}: give the vocabulary it was trained with as --tokenizer=DIR"
        )
    new = "qformer" if checkpoints and checkpoints[-1].table.name == "BERT" else ""
    return finish_plan(request, config, checkpoints, sources, tokenizer, new, notes)


def _open_stage1(request: BuildRequest, notes: list[str]) -> list[MappedCheckpoint]:
    """In the order in which later ones replace parameters of earlier ones."""
    checkpoints = open_vision(request)
    for option in ("qformer", "checkpoint"):
        path, flag = getattr(request, option), f"--{option}"
        if path is None:
            continue
        if is_hf_blip2(path):
            label = str(path / "config.json")
            found = hf_values(read_json(path / "config.json"), label, notes, reads_text=True)
            checkpoints.append(open_hf(flag, path, HF_ITM, found, notes))
        elif is_bert(path):
            checkpoints.append(open_bert(flag, path))
        else:
            checkpoints.append(open_lavis(flag, path, (STAGE1, NATIVE)))
    if all(c.option == "--vision" for c in checkpoints):
        raise UserError(
            f"{request.variant} needs --checkpoint=PATH (for instance blip2_pretrained.pth, or the "
            "Hugging Face directory of an image-text matching model), or --qformer=DIR with BERT"
        )
    return checkpoints


def _stage1_qformer(
    checkpoints: list[MappedCheckpoint], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """QFormerConfig fields of a Q-Former with a text branch."""
    checkpoint = checkpoints[-1]
    shapes = checkpoint.shapes("qformer.")
    text = text_config(shapes, checkpoint.label)
    if checkpoint.table.name == "BERT":
        hidden = shapes["qformer.embed"][-1]
        layers = 1 + max(int(n.split(".")[2]) for n in shapes if n.startswith("qformer.blocks."))
        heads = settings.get("qformer.heads") or _bert_heads(checkpoint)
        vision = next((c for c in checkpoints if c.shapes("vit.cls")), checkpoint)
        return {
            "hidden": hidden, "layers": layers, "heads": heads,
            "ffn": shapes["qformer.blocks.0.text_mlp.up.weight"][0],
            "vision_width": vision.shapes("vit.cls")["vit.cls"][-1],
            **text, "vocab": text["vocab"] + 1, "itc_width": 256, "lm_head": True,
        }  # fmt: skip
    if recorded := checkpoint.sizes.get("qformer"):
        return {**recorded, **text}
    return {**qformer_config(shapes, checkpoint.label, settings), **text}


def _bert_heads(checkpoint: MappedCheckpoint) -> int:
    folder = Path(checkpoint.reader.label)
    folder = folder if folder.is_dir() else folder.parent
    return int(read_json(folder / "config.json")["num_attention_heads"])


def _bert_tokenizer(request: BuildRequest) -> TokenizerFiles:
    """vocab.txt from --tokenizer, or from the directory that the Q-Former comes from."""
    folders = (request.tokenizer, request.checkpoint, request.qformer)
    for folder in folders:
        if folder is not None and (folder / VOCABULARY).is_file():
            found = find_tokenizer(folder)
            kept = (VOCABULARY, "tokenizer_config.json")
            return TokenizerFiles({n: found[n] for n in kept if n in found}, str(folder))
    raise UserError(
        f"{request.variant} needs --tokenizer=DIR with BERT's {VOCABULARY} (that of bert-base-uncased)"
    )
