"""python -m convert build: released checkpoints -> one model directory.

Everything is checked against names and shapes first; only then are tensors read, one at a time.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert.derive import lora_config, qformer_config, vision_config
from convert.files import HashedFile
from convert.llm import LanguageModel, open_llm
from convert.settings import Variant, apply_settings, chat_format, parse_settings, variant_named
from convert.sources import Source, llm_source, open_source, packaged_encoder
from convert.tables import BLIP2, EVA, FINE_TUNED, OWN, Match
from minigpt4_jax.config import LlmConfig, LoraConfig, ModelConfig, QFormerConfig, TokenizerConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.weights import parameter_shapes, part_of, write_model

_FLOATS = ("float16", "bfloat16", "float32")


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
    llm_dtype: str | None = None


@dataclass
class Sources:
    """What was opened. `vision` and `qformer` may be one file."""

    vision: Source
    qformer: Source | None
    llm: Source
    checkpoint: Source | None

    def all(self) -> list[Source]:
        distinct: list[Source] = []
        for s in (self.vision, self.qformer, self.llm, self.checkpoint):
            if s is not None and all(s is not d for d in distinct):
                distinct.append(s)
        return distinct


@dataclass
class Plan:
    """A checked model: where each parameter comes from, what is made new, and what is said about it."""

    config: ModelConfig
    sources: Sources
    wanted: dict[str, tuple[int, ...]]
    origin: dict[str, tuple[Source, Match]]
    fresh: list[str]
    language: LanguageModel
    notes: list[str]


def build(request: Request) -> Plan:
    """Make the model directory request.out. UserError, before anything is written, when it cannot be."""
    started = time.monotonic()
    check_output(request.out)
    plan = make_plan(request)
    size = _check_disk(plan, request)
    record: dict[str, Any] = {}
    tensors = _tensors(plan, request, record)
    write_model(request.out, plan.config, tensors, tokenizer=plan.language.tokenizer, sources=record)
    count = sum(int(np.prod(s)) for s in plan.wanted.values())
    for note in plan.notes:
        print(f"note: {note}")
    print(
        f"wrote {request.out}: {plan.config.variant}, {count:,} parameters, {size / 1e9:.2f} GB "
        f"in {time.monotonic() - started:.0f} s"
    )
    return plan


def check_output(out: Path) -> None:
    """UserError when `out` cannot become a new directory."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out: {out} exists and is not empty: choose another or remove it first")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as e:
        raise UserError(f"--out: cannot write into {parent}: {e.strerror}") from e


def make_plan(request: Request) -> Plan:
    """Open the sources, derive the configuration, and match every parameter. Reads no weights."""
    variant = variant_named(request.variant)
    given = parse_settings(request.settings)
    notes: list[str] = []
    language = open_llm(request.llm, request.llm_delta, request.tokenizer)
    sources = _open_sources(request, variant, language, notes)
    values = _derive(request.variant, variant, sources, language, given)
    for name in apply_settings(values, given):
        notes.append(f"--set {name} is not used: {request.variant} has no such part here")
    _check_language(values["llm"], sources, values["tokenizer"].pop("size"))
    config = ModelConfig.from_dict(values).check()
    _check_trained(config, sources, notes)
    origin, problems = _collect(config, sources, notes)
    wanted = parameter_shapes(config)
    fresh = _fill(wanted, origin, sources, notes)
    problems += _shape_problems(wanted, origin, fresh)
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"the files do not make this model: {'; '.join(problems[:10])}{more}")
    return Plan(config, sources, wanted, origin, fresh, language, notes)


# --- opening --------------------------------------------------------------------------------------


def _open_sources(request: Request, variant: Variant, language: LanguageModel, notes: list[str]) -> Sources:
    packaged = request.vision is None
    vision_path = packaged_encoder() if request.vision is None else request.vision
    vision = open_source("--vision", vision_path, (EVA, OWN))
    if packaged:
        notes.append(f"no --vision: the packaged demonstration encoder {vision_path.name} is used")
    qformer = None
    if not variant.qformer:
        if request.qformer is not None:
            notes.append(f"--qformer is not used: {request.variant} has no Q-Former")
    elif request.qformer is not None:
        qformer = open_source("--qformer", request.qformer, (BLIP2, OWN))
    elif any(name.startswith("qformer.") for name in vision.found):
        qformer = vision
    else:
        raise UserError(f"{request.variant} needs --qformer=FILE (for instance blip2_pretrained_flant5xxl.pth)")
    checkpoint = None
    if request.checkpoint is not None:
        checkpoint = open_source("--checkpoint", request.checkpoint, (FINE_TUNED, OWN))
    return Sources(vision, qformer, llm_source(language), checkpoint)


# --- the configuration ----------------------------------------------------------------------------


def _derive(
    name: str, variant: Variant, s: Sources, language: LanguageModel, given: dict[str, Any]
) -> dict[str, Any]:
    """ModelConfig fields, from the variant, the tensors' shapes and the language model's config."""
    tokenizer, size = _read_tokenizer(language)
    values: dict[str, Any] = {
        "variant": name,
        "vision": _vision(s.vision, variant, given),
        "qformer": None,
        "llm": ModelConfig(llm=LlmConfig.from_hf(language.config)).to_dict()["llm"],
        "lora": None,
        "merge_patches": variant.merge_patches,
        "prompt_template": variant.prompt_template,
        "chat_template": variant.chat_template,
        "end_symbol": variant.end_symbol,
        "max_text_length": variant.max_text_length,
        "tokenizer": {**ModelConfig(tokenizer=tokenizer).to_dict()["tokenizer"], "size": size},
    }
    if s.qformer is not None:
        values["qformer"] = s.qformer.sizes.get("qformer") or qformer_config(
            s.qformer.shapes("qformer."), s.qformer.where, given
        )
    if variant.lora:
        lora = {} if s.checkpoint is None else _lora_shapes(s.checkpoint)
        where = s.checkpoint.where if s.checkpoint else ""
        fields = lora_config(lora, where) if lora else {}
        values["lora"] = {**ModelConfig(lora=LoraConfig()).to_dict()["lora"], **fields}
    if tokenizer.kind == "hf":  # not LLaMA 1/2 or Vicuna: it answers in its own chat format
        values |= chat_format(language.chat_template())
    return values


def _vision(source: Source, variant: Variant, given: dict[str, Any]) -> dict[str, Any]:
    if "vision" in source.sizes:
        return dict(source.sizes["vision"])
    return vision_config(
        source.shapes("vit."), source.where,
        spare_block=source.table is EVA, scale=variant.image_scale, given=given,
    )  # fmt: skip


def _lora_shapes(checkpoint: Source) -> dict[str, tuple[int, ...]]:
    return {n: shape for n, shape in checkpoint.shapes().items() if ".lora_" in n}


def _read_tokenizer(language: LanguageModel) -> tuple[TokenizerConfig, int]:
    """The tokenizer's special ids and the number of its tokens; loading it is the test that it works."""
    from minigpt4_jax.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as tmp:
        for name, content in language.tokenizer.items():
            if isinstance(content, bytes):
                (Path(tmp) / name).write_bytes(content)
            else:
                shutil.copyfile(content, Path(tmp) / name)
        legacy = language.config.get("model_type") == "llama" or "tokenizer.json" not in language.tokenizer
        try:
            t = load_tokenizer(Path(tmp), None if legacy else "hf")
        except UserError as e:
            raise UserError(str(e).replace(tmp, language.tokenizer_origin)) from e
        return TokenizerConfig(kind=t.kind, bos_id=t.bos_id, eos_id=t.eos_id, pad_id=t.pad_id), t.vocab_size


# --- checks that name the likely mistake ----------------------------------------------------------


def _check_language(llm: dict[str, Any], s: Sources, size: int) -> None:
    """The tokenizer fits the vocabulary, and the vocabulary the embedding."""
    where, vocab = s.llm.where, llm["vocab"]
    rows = s.llm.shapes("llm.embed").get("llm.embed", (vocab,))[0]
    if rows != vocab:
        raise UserError(
            f"{where}: config.json says {vocab} tokens, the embedding has {rows}: the files do not belong "
            f"together (--set llm.vocab={rows} if they do)"
        )
    if size > vocab:
        raise UserError(
            f"{where}: its tokenizer has {size} tokens, the model only {vocab}: this is another model's tokenizer"
        )
    if vocab - size > max(1024, vocab // 10):  # rows that only pad the vocabulary are fewer
        raise UserError(
            f"{where}: the model has {vocab} tokens, its tokenizer only {size}: this is another model's tokenizer"
        )


def _check_trained(config: ModelConfig, s: Sources, notes: list[str]) -> None:
    """The fine-tuned checkpoint belongs to this variant and this language model."""
    if s.checkpoint is None:
        return
    where, shapes = s.checkpoint.where, s.checkpoint.shapes()
    lora = _lora_shapes(s.checkpoint)
    if lora and config.lora is None:
        raise UserError(
            f"{where} holds LoRA weights ({len(lora)} of them), which {config.variant} would lose: "
            "it is a minigpt-v2 checkpoint, give --variant=minigpt-v2"
        )
    if config.lora is not None and not lora:
        raise UserError(
            f"{where} holds no LoRA weights, which minigpt-v2 needs: it is a MiniGPT-4 checkpoint, give "
            "--variant=minigpt4-llama2 or minigpt4-vicuna"
        )
    if "projection.weight" not in shapes:
        raise UserError(f"{where} holds no llama_proj.weight: it is not a MiniGPT-4 checkpoint")
    out, n_in = shapes["projection.weight"]
    if out != config.llm.width:
        raise UserError(
            f"{where} was trained for a language model of width {out}, {s.llm.where} has width "
            f"{config.llm.width}: use the language model it was trained with"
        )
    if n_in != config.projection_in:
        raise UserError(f"{where} projects from width {n_in}, {_why_not(config, s, n_in)}")


def _why_not(config: ModelConfig, s: Sources, n_in: int) -> str:
    joined = 4 * config.vision.width
    if config.qformer is not None:
        have = f"the Q-Former of {config.variant} gives {config.qformer.hidden}"
        hint = "it belongs to minigpt4-llama2 or minigpt-v2" if n_in == joined else f"check {s.qformer and s.qformer.where}"
    else:
        have = f"{config.merge_patches} joined patches of {config.variant} give {config.projection_in}"
        hint = f"check {s.vision.where}" if n_in % 4 == 0 and n_in > joined else "it belongs to minigpt4-vicuna"
    return f"{have}: {hint}"


# --- matching -------------------------------------------------------------------------------------


def _collect(
    config: ModelConfig, s: Sources, notes: list[str]
) -> tuple[dict[str, tuple[Source, Match]], list[str]]:
    """Parameter -> its source; what a fine-tuned checkpoint holds replaces the frozen original."""
    origin: dict[str, tuple[Source, Match]] = {}
    parts = [("vit.", s.vision), ("llm.", s.llm)]
    if s.qformer is not None:
        parts.append(("qformer.", s.qformer))
    own_norm = s.vision.table is OWN or s.qformer is None
    parts.append(("ln_vision.", s.vision if own_norm else s.qformer))  # type: ignore[arg-type]
    for prefix, source in parts:
        origin |= {n: (source, m) for n, m in source.found.items() if n.startswith(prefix)}
    if s.checkpoint is not None:
        found = s.checkpoint.found
        frozen = [n for n in found if part_of(n) in ("vit", "qformer")]
        if frozen:
            notes.append(f"{len(frozen)} vision parameters come from {s.checkpoint.where}, not the originals")
        origin |= {n: (s.checkpoint, m) for n, m in found.items()}
    _drop_unused(config, s, origin, notes)
    problems = [f"{src.where}: unknown key {key}" for src in s.all() for key in src.unknown]
    return origin, problems


def _drop_unused(
    config: ModelConfig, s: Sources, origin: dict[str, tuple[Source, Match]], notes: list[str]
) -> None:
    """What is knowingly left out: ViT blocks past `depth`, and a tied head."""
    spare = [n for n in origin if n.startswith("vit.blocks.") and int(n.split(".")[2]) >= config.vision.depth]
    dropped = sorted({int(n.split(".")[2]) for n in spare})
    if dropped:
        notes.append(f"vision block {', '.join(map(str, dropped))} is not used (vision.depth={config.vision.depth})")
    for name in spare:
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
    """Parameters made new: projection and LoRA without --checkpoint, ln_vision without BLIP-2's."""
    parts = {"projection", "lora"} if s.checkpoint is None else set()
    fresh = [n for n in wanted if n not in origin and part_of(n) in parts]
    if s.qformer is None:  # the original never loads ln_vision without a Q-Former: gamma 1, beta 0
        fresh += [n for n in wanted if n not in origin and n.startswith("ln_vision.")]
    if parts & {part_of(n) for n in fresh}:
        notes.append("no --checkpoint: the projection is new and knows nothing until it is trained")
    return fresh


def _shape_problems(
    wanted: dict[str, tuple[int, ...]], origin: dict[str, tuple[Source, Match]], fresh: list[str]
) -> list[str]:
    problems = [f"{name} is in no file" for name in wanted if name not in origin and name not in fresh]
    for name, (source, m) in origin.items():
        tensor = source.reader.tensors[m.key]
        if name not in wanted:
            problems.append(f"{source.where}: {m.key} has no place in this model")
        elif not m.transform.fits(tensor.shape, wanted[name]):
            problems.append(f"{source.where}: {m.key} has shape {tensor.shape}, expected {wanted[name]}")
        elif tensor.dtype.name not in _FLOATS + ("float64",):
            problems.append(f"{source.where}: {m.key} holds {tensor.dtype.name}, expected floating point")
    return problems


# --- writing --------------------------------------------------------------------------------------


def _stored_type(plan: Plan, name: str, llm_dtype: str | None) -> np.dtype:
    """Every tensor keeps its type (interpolated positions and float64 become float32)."""
    from convert.tensors import DTYPES

    if name in plan.fresh:
        return np.dtype(np.float32)
    source, m = plan.origin[name]
    if llm_dtype and part_of(name) == "llm":
        return DTYPES[llm_dtype]
    dtype = source.reader.tensors[m.key].dtype
    return dtype if dtype.name in _FLOATS else np.dtype(np.float32)


def _check_disk(plan: Plan, request: Request) -> int:
    size = sum(
        int(np.prod(shape)) * _stored_type(plan, name, request.llm_dtype).itemsize
        for name, shape in plan.wanted.items()
    )
    parent = request.out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if size > free:
        raise UserError(f"--out: {parent} has {free / 1e9:.1f} GB free, the model needs {size / 1e9:.1f} GB")
    return size


def _tensors(plan: Plan, request: Request, record: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter, in the order of the files; afterwards `record` says where they came from."""
    from tqdm import tqdm

    rng = np.random.default_rng(request.seed)
    for name in sorted(plan.fresh):
        yield name, _fresh(name, plan.wanted[name], plan.wanted, rng)
    items = sorted(plan.origin.items(), key=lambda item: _order(*item[1]))
    total = sum(source.reader.tensors[m.key].nbytes for _, (source, m) in items)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as bar:
        for name, (source, m) in items:
            want = plan.wanted[name]
            stored = _stored_type(plan, name, request.llm_dtype)
            array = m.transform.apply(source.reader.read(m.key), want)
            if array.dtype != stored and not (name == "vit.pos" and array.dtype == np.float32):
                array = array.astype(stored)
            yield name, array
            bar.update(source.reader.tensors[m.key].nbytes)
    record |= _record(plan)


def _order(source: Source, m: Match) -> tuple[str, int]:
    return source.reader.tensors[m.key].order


def _fresh(
    name: str, shape: tuple[int, ...], wanted: dict[str, tuple[int, ...]], rng: np.random.Generator
) -> np.ndarray:
    """torch.nn.Linear's initialization for the projection, peft's for LoRA, identity for ln_vision."""
    if name.startswith("ln_vision."):
        return np.full(shape, name.endswith("scale"), np.float32)
    if name.endswith("lora_b"):
        return np.zeros(shape, np.float32)
    n_in = shape[-1] if len(shape) > 1 else wanted["projection.weight"][-1]
    return rng.uniform(-(n_in**-0.5), n_in**-0.5, shape).astype(np.float32)


def _record(plan: Plan) -> dict[str, Any]:
    """Part -> file and SHA-256, for model.json."""
    record = {s.option.removeprefix("--"): s.reader.origin() for s in plan.sources.all()}
    if plan.sources.qformer is plan.sources.vision:
        record["qformer"] = record["vision"]
    if plan.sources.checkpoint is None:
        record["projection"] = {"file": None, "note": "new, not trained"}
    digests = {}
    for name, content in plan.language.tokenizer.items():
        if isinstance(content, Path):
            digests[name] = HashedFile(content).sha256()
    record["tokenizer"] = {"file": plan.language.tokenizer_origin, "files": digests}
    return record
