"""What `build` will do, decided before anything is written: sources opened and matched."""

import dataclasses
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convert.formats.gguf_blocks import KINDS, kinds_of
from convert.infer_config import lora_config, qformer_config, vision_config
from convert.key_mapping import BLIP2, EVA, FINE_TUNED, OWN, Match
from convert.language_model import LanguageModel, drop_added_tokens, open_llm
from convert.overrides import Variant, apply_settings, chat_format, parse_settings, variant_named
from convert.sources import Source, Sources, llm_source, lora_shapes, open_source, packaged_encoder
from convert.validate import check_language, check_trained, shape_problems
from minigpt4_jax.checkpoint.weights import parameter_shapes, part_of
from minigpt4_jax.config import LlmConfig, LoraConfig, ModelConfig, TokenizerConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.quantization import schemes

KEEP = "keep"  # --quantize: as the GGUF file has it


@dataclass
class Request:
    """The command line of `build`."""

    variant: str
    llm: Path
    out: Path
    vision: Path | None = None
    qformer: Path | None = None
    checkpoint: Path | None = None
    llm_delta: Path | None = None
    tokenizer: Path | None = None
    settings: list[str] = field(default_factory=list)
    seed: int = 0
    projection_scale: float = 1.0
    llm_dtype: str | None = None
    quantize: str | None = None


@dataclass
class BuildPlan:
    """A checked model: where each parameter comes from, what is made new, what to tell the user.

    config, wanted: of the model in floats; held: the configuration as it is stored.
    """

    config: ModelConfig
    held: ModelConfig
    sources: Sources
    language: LanguageModel
    wanted: dict[str, tuple[int, ...]]
    origin: dict[str, tuple[Source, Match]]
    fresh: list[str]
    notes: list[str]


def make_plan(request: Request) -> BuildPlan:
    """Open the sources, derive the configuration, match every parameter; reads no weights.

    UserError for files that are damaged, unknown, or do not belong together.
    """
    variant = variant_named(request.variant)
    given = parse_settings(request.settings)
    notes: list[str] = []
    language = open_llm(request.llm, request.llm_delta, request.tokenizer)
    sources = _open_sources(request, variant, language, notes)
    tokenizer, pieces = _read_tokenizer(language)
    values = _derive(request.variant, variant, sources, language, tokenizer, given)
    for name in apply_settings(values, given):
        notes.append(f"--set {name} is not used: this {request.variant} has no such part")
    config = ModelConfig.from_dict(values).check()
    if tokenizer.kind == "sentencepiece" and pieces > config.llm.vocab:
        if dropped := drop_added_tokens(language, config.llm.vocab):
            notes.append(
                f"added tokens {', '.join(dropped)} left out: the model has no row for them"
            )
        _, pieces = _read_tokenizer(language)
    check_language(config, sources, pieces)
    check_trained(config, sources)
    origin = _collect(config, sources, notes)
    wanted = parameter_shapes(config)
    fresh = _fill(wanted, origin, sources, notes)
    if request.projection_scale != 1.0 and sources.checkpoint is not None:
        notes.append("--projection-scale is not used: the projection comes from --checkpoint")
    problems = [f"{s.where}: unknown key {key}" for s in sources.all() for key in s.unknown]
    problems += shape_problems(wanted, origin, fresh)
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"the files do not make this model: {'; '.join(problems[:10])}{more}")
    held = _held(config, request, origin, notes).check()
    return BuildPlan(config, held, sources, language, wanted, origin, fresh, notes)


def _held(
    config: ModelConfig,
    request: Request,
    origin: dict[str, tuple[Source, Match]],
    notes: list[str],
) -> ModelConfig:
    """The configuration with the scheme that was asked for."""
    if request.quantize != KEEP:
        return dataclasses.replace(config, quantize=request.quantize)
    types = {}
    for name, (source, m) in origin.items():
        if name.startswith("llm.") and schemes.scheme_of(name, "int8", 1):
            blocks = source.reader.tensors[m.key].blocks
            types[name] = blocks and blocks[0]
    kept = kinds_of(types)
    whole = [line for line in kept if not line.endswith(" int8")]
    if not whole:
        raise UserError(
            f"--quantize=keep: {request.llm} holds no matrix in {', '.join(KINDS)}; it keeps what a "
            "GGUF file holds so. Give --quantize=int8 or int4"
        )
    if rounded := len(kept) - len(whole):
        notes.append(
            f"{len(whole)} of the {len(kept)} kinds of matrix stay as they are in the file; "
            f"{rounded} of other types than {', '.join(KINDS)} are rounded to int8"
        )
    return dataclasses.replace(config, quantize=schemes.GGUF, kept=kept)


def _open_sources(
    request: Request, variant: Variant, language: LanguageModel, notes: list[str]
) -> Sources:
    path = request.vision
    if path is None:
        path = packaged_encoder()
        notes.append(f"no --vision: the packaged demonstration encoder {path.name} is used")
    vision = open_source("--vision", path, (EVA, OWN))
    qformer = None
    if not variant.qformer:
        if request.qformer is not None:
            notes.append(f"--qformer is not used: {request.variant} has no Q-Former")
    elif request.qformer is not None:
        qformer = open_source("--qformer", request.qformer, (BLIP2, OWN))
    elif any(name.startswith("qformer.") for name in vision.found):
        qformer = vision
    else:
        example = "blip2_pretrained_flant5xxl.pth"
        raise UserError(f"{request.variant} needs --qformer=FILE (for instance {example})")
    checkpoint = None
    if request.checkpoint is not None:
        checkpoint = open_source("--checkpoint", request.checkpoint, (FINE_TUNED, OWN))
    return Sources(vision, qformer, llm_source(language), checkpoint)


def _read_tokenizer(language: LanguageModel) -> tuple[TokenizerConfig, int]:
    """Special ids and the number of tokens; loading the tokenizer is the test that it works."""
    from minigpt4_jax.processing.tokenizer import load_tokenizer

    llama = language.config.get("model_type") == "llama"
    legacy = llama or "tokenizer.json" not in language.tokenizer
    with tempfile.TemporaryDirectory() as tmp:
        for name, content in language.tokenizer.items():
            if isinstance(content, bytes):
                (Path(tmp) / name).write_bytes(content)
            else:
                shutil.copyfile(content, Path(tmp) / name)
        try:
            t = load_tokenizer(Path(tmp), None if legacy else "hf")
        except UserError as e:
            raise UserError(str(e).replace(tmp, language.tokenizer_origin)) from e
        return TokenizerConfig(t.kind, t.bos_id, t.eos_id, t.pad_id), t.vocab_size


def _derive(
    name: str,
    variant: Variant,
    s: Sources,
    language: LanguageModel,
    tokenizer: TokenizerConfig,
    given: dict[str, Any],
) -> dict[str, Any]:
    """ModelConfig fields, from the variant, the tensors' shapes and the language model's config."""
    vision = s.vision.sizes.get("vision") or vision_config(
        s.vision.shapes("vit."),
        s.vision.where,
        spare_block=s.vision.table is EVA,
        scale=variant.image_scale,
        given=given,
    )
    qformer = None
    if s.qformer is not None:
        qformer = s.qformer.sizes.get("qformer") or qformer_config(
            s.qformer.shapes("qformer."), s.qformer.where, given
        )
    lora = None
    own = s.checkpoint.sizes.get("lora") if s.checkpoint is not None else None
    if variant.lora or own or any(key.startswith("lora.") for key in given):
        lora = asdict(LoraConfig()) | (own or {})
        if s.checkpoint is not None and (shapes := lora_shapes(s.checkpoint)):
            lora |= lora_config(shapes, s.checkpoint.where)
    values: dict[str, Any] = {
        "variant": name,
        "vision": dict(vision),
        "qformer": qformer and dict(qformer),
        "llm": asdict(LlmConfig.from_hf(language.config)),
        "lora": lora,
        "merge_patches": variant.merge_patches,
        "prompt_template": variant.prompt_template,
        "chat_template": variant.chat_template,
        "end_symbol": variant.end_symbol,
        "max_text_length": variant.max_text_length,
        "tokenizer": asdict(tokenizer),
    }
    if tokenizer.kind == "hf":  # not LLaMA 1/2 or Vicuna: it answers in its own chat format
        values |= chat_format(language.chat_template())
    return values


def _collect(config: ModelConfig, s: Sources, notes: list[str]) -> dict[str, tuple[Source, Match]]:
    """Parameter -> its source; what a fine-tuned checkpoint holds replaces the frozen original."""
    parts = [("vit.", s.vision), ("llm.", s.llm)]
    if s.qformer is not None:
        parts.append(("qformer.", s.qformer))
    # BLIP-2's ln_vision goes with its Q-Former only; our own encoders were trained with theirs.
    norm = s.vision if s.vision.table is OWN or s.qformer is None else s.qformer
    parts.append(("ln_vision.", norm))
    origin: dict[str, tuple[Source, Match]] = {}
    for prefix, source in parts:
        origin |= {n: (source, m) for n, m in source.found.items() if n.startswith(prefix)}
    if s.checkpoint is not None:
        found = s.checkpoint.found
        if frozen := [n for n in found if part_of(n) in ("vit", "qformer")]:
            where = s.checkpoint.where
            notes.append(f"{len(frozen)} vision parameters come from {where}, not the originals")
        origin |= {n: (s.checkpoint, m) for n, m in found.items()}
    _drop_unused(config, origin, notes)
    return origin


def _drop_unused(
    config: ModelConfig, origin: dict[str, tuple[Source, Match]], notes: list[str]
) -> None:
    """What is knowingly left out: ViT blocks past `depth`, and the head of a tied model."""
    depth = config.vision.depth
    blocks = {n: int(n.split(".")[2]) for n in origin if n.startswith("vit.blocks.")}
    if spare := sorted({i for i in blocks.values() if i >= depth}):
        which = ", ".join(map(str, spare))
        notes.append(f"vision block {which} of the file is not used (vision.depth={depth})")
    for name, i in blocks.items():
        if i >= depth:
            del origin[name]
    if config.llm.tie and "llm.head.weight" in origin:
        del origin["llm.head.weight"]
        notes.append("lm_head.weight is not used: the language model ties it to the embedding")


def _fill(
    wanted: dict[str, tuple[int, ...]],
    origin: dict[str, tuple[Source, Match]],
    s: Sources,
    notes: list[str],
) -> list[str]:
    """Parameters made new: projection and LoRA without --checkpoint, ln_vision of a plain ViT."""
    missing = [n for n in wanted if n not in origin]
    parts = {"projection", "lora"} if s.checkpoint is None else set()
    if s.checkpoint is not None and not lora_shapes(s.checkpoint):
        parts = {"lora"}  # asked for by --set
    fresh = [n for n in missing if part_of(n) in parts]
    if s.checkpoint is None:
        notes.append("no --checkpoint: the projection is new and means nothing until it is trained")
    if any(part_of(n) == "lora" for n in fresh):
        notes.append("LoRA is new: it changes nothing until it is trained")
    if s.qformer is None:  # the original never loads ln_vision without one: gamma 1, beta 0
        fresh += [n for n in wanted if n not in origin and n.startswith("ln_vision.")]
    return fresh
