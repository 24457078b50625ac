"""Plans a build before anything is written: opens the inputs and finds a source for each parameter."""

import shutil
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from convert.chat_format import string_format, tokenizer_format, wants_tokenizer_template
from convert.end_tokens import other_end_ids
from convert.formats.gguf_blocks import BLOCK_FORMATS, kept_formats
from convert.infer_config import lora_config, qformer_config, vision_config
from convert.key_mapping import BLIP2, EVA, FINE_TUNED, NATIVE
from convert.language_model import (
    LanguageModelFiles,
    TokenizerFiles,
    drop_added_tokens,
    open_llm,
)
from convert.llm_config import llm_config, resolve_tied_embeddings
from convert.overrides import Variant, apply_settings, parse_settings, variant_named
from convert.resample import grid_side
from convert.sources import (
    BuildInputs,
    MappedCheckpoint,
    ParameterSource,
    llm_checkpoint,
    lora_shapes,
    open_checkpoint,
    packaged_encoder,
)
from convert.validate import check_fine_tuned, check_vocabulary, shape_problems
from minigpt4_jax.checkpoint.parameters import parameter_shapes, part_of
from minigpt4_jax.config import LoraConfig, ModelConfig, TokenizerConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.quantization import schemes

KEEP = "keep"  # --quantize: the quantized blocks of the GGUF file


@dataclass
class BuildRequest:
    """The command line of `build`."""

    variant: str
    llm: Path | None
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
    allow_nonfinite: bool = False


@dataclass
class BuildPlan:
    """A checked build.

    config: of the model before quantization; shapes: of its parameters. stored_config: of the model
    as it is written. checkpoints: the files that are read. sources: of the parameters that are
    read; new_parameters: the others. notes: messages for the user.
    """

    config: ModelConfig
    stored_config: ModelConfig
    tokenizer: TokenizerFiles
    checkpoints: list[MappedCheckpoint]
    shapes: dict[str, tuple[int, ...]]
    sources: dict[str, ParameterSource]
    new_parameters: list[str]
    notes: list[str]
    # entries of model.json's `sources` beside those of the checkpoints, or functions that return them
    special_origins: dict[str, Any] = field(default_factory=dict)


def make_plan(request: BuildRequest) -> BuildPlan:
    """Open the inputs, derive the configuration, find a source for each parameter; reads no weights.

    UserError for files that are damaged, unknown, or do not belong together.
    """
    variant = variant_named(request.variant)
    settings = parse_settings(request.settings)
    notes: list[str] = []
    if request.llm is None:
        raise UserError(f"{request.variant} needs --llm=PATH, its language model")
    language = open_llm(request.llm, request.llm_delta, request.tokenizer)
    notes += language.notes
    inputs = _open_inputs(request, variant, language, notes)
    tokenizer, tokens, chat = _read_tokenizer(language, variant, settings, notes)
    values = _config_values(request.variant, variant, inputs, language, settings, notes)
    values |= {"tokenizer": asdict(tokenizer), **chat}
    for name in apply_settings(values, settings):
        notes.append(f"--set {name} is not used: {request.variant} has no such part")
    config = ModelConfig.from_dict(values).check()
    if tokenizer.kind == "sentencepiece" and tokens > config.llm.vocab:
        if dropped := drop_added_tokens(language, config.llm.vocab):
            notes.append(
                f"added tokens {', '.join(dropped)} left out: the model has no embedding for them"
            )
        _, tokens, _ = _read_tokenizer(language, variant, settings, [])
    check_vocabulary(config, inputs, tokens)
    check_fine_tuned(config, inputs)
    sources = _assign_sources(config, inputs, notes)
    shapes = parameter_shapes(config)
    new_parameters = _new_parameters(shapes, sources, inputs, notes)
    if request.projection_scale != 1.0 and inputs.checkpoint is not None:
        notes.append("--projection-scale is not used: the projection comes from --checkpoint")
    raise_problems(
        [*unknown_keys(inputs.all()), *shape_problems(shapes, sources, new_parameters, inputs)]
    )
    own_size = bool(settings.keys() & {"vision.image_size", "vision.patch_size"})
    notes += _resampling_notes(config, sources["vit.pos"], own_size=own_size)
    stored = stored_config(config, request, sources, notes).check()
    return BuildPlan(
        config, stored, TokenizerFiles(language.tokenizer, language.tokenizer_origin),
        inputs.all(), shapes, sources, new_parameters, notes, _special_origins(inputs),
    )  # fmt: skip


def _special_origins(inputs: BuildInputs) -> dict[str, Any]:
    """Entries of `sources` that name no file of their own."""
    origins: dict[str, Any] = {}
    if inputs.qformer is inputs.vision:
        origins["qformer"] = inputs.vision.reader.origin
    if inputs.checkpoint is None:
        origins["checkpoint"] = {"file": None, "note": "new projection, not trained"}
    return origins


def _resampling_notes(
    config: ModelConfig, positions: ParameterSource, *, own_size: bool
) -> list[str]:
    """Says that the position embedding is interpolated to the model's image size, if it is.

    own_size: the size comes from --set, not from the variant."""
    patch = config.vision.patch_size
    old, new = grid_side(positions.tensor.shape[-2]), config.vision.image_size // patch
    if old == new:
        return []
    return [
        f"image_size {config.vision.image_size}: the position embedding of {old} x {old} patches "
        f"({old * patch} px) in {positions.checkpoint.label} is interpolated to {new} x {new}"
        + ("; the encoder was not trained at this size" if own_size else ", as in the original")
    ]


def unknown_keys(checkpoints: list[MappedCheckpoint]) -> list[str]:
    """A message for each key that no rule knows."""
    return [f"{c.label}: unknown key {key}" for c in checkpoints for key in c.unknown_keys]


def raise_problems(problems: list[str]) -> None:
    """One UserError for all problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise UserError(f"the files do not fit this model: {'; '.join(problems[:10])}{more}")


def stored_config(
    config: ModelConfig,
    request: BuildRequest,
    sources: dict[str, ParameterSource],
    notes: list[str],
) -> ModelConfig:
    """The configuration with the requested quantization."""
    if request.quantize != KEEP:
        return replace(config, quantize=request.quantize)
    gguf_types: dict[str, str | None] = {}
    for name, source in sources.items():
        if name.startswith("llm.") and schemes.matrix_scheme(name, "int8", 1):
            blocks = source.tensor.blocks
            gguf_types[name] = None if blocks is None else blocks.gguf_type
    lines = kept_formats(gguf_types)
    kept = [line for line in lines if not line.endswith(" int8")]
    if not kept:
        raise UserError(
            f"--quantize=keep: {request.llm} has no matrix of type {', '.join(BLOCK_FORMATS)}, the "
            "types of a GGUF file that can be kept. Give --quantize=int8 or int4"
        )
    if rounded := len(lines) - len(kept):
        notes.append(
            f"{len(kept)} of the {len(lines)} kinds of matrix are kept as they are in the file; "
            f"{rounded} have another type than {', '.join(BLOCK_FORMATS)} and are rounded to int8"
        )
    return replace(config, quantize=schemes.GGUF, kept=lines)


def _open_inputs(
    request: BuildRequest, variant: Variant, language: LanguageModelFiles, notes: list[str]
) -> BuildInputs:
    path = request.vision
    if path is None:
        path = packaged_encoder()
        notes.append(f"no --vision: using the packaged demonstration encoder {path.name}")
    vision = open_checkpoint("--vision", path, (EVA, NATIVE))
    qformer = None
    if not variant.qformer:
        if request.qformer is not None:
            notes.append(f"--qformer is not used: {request.variant} has no Q-Former")
    elif request.qformer is not None:
        qformer = open_checkpoint("--qformer", request.qformer, (BLIP2, NATIVE))
    elif any(name.startswith("qformer.") for name in vision.mapped):
        qformer = vision
    else:
        example = "blip2_pretrained_flant5xxl.pth"
        raise UserError(f"{request.variant} needs --qformer=FILE (for instance {example})")
    checkpoint = None
    if request.checkpoint is not None:
        checkpoint = open_checkpoint("--checkpoint", request.checkpoint, (FINE_TUNED, NATIVE))
    return BuildInputs(vision, qformer, llm_checkpoint(language), checkpoint)


def _read_tokenizer(
    language: LanguageModelFiles, variant: Variant, settings: dict[str, Any], notes: list[str]
) -> tuple[TokenizerConfig, int, dict[str, str]]:
    """(special ids, number of tokens, ModelConfig fields of the prompt format).

    Loads the tokenizer, which also checks that it works.
    """
    from minigpt4_jax.processing.tokenizer import HfTokenizer, load_tokenizer

    llama = language.config.get("model_type") == "llama"
    original = llama or "tokenizer.json" not in language.tokenizer
    own = wants_tokenizer_template(variant, language.chat_template(), settings, llama=llama)
    with tempfile.TemporaryDirectory() as tmp:
        for name, content in language.tokenizer.items():
            if isinstance(content, bytes):
                (Path(tmp) / name).write_bytes(content)
            else:
                shutil.copyfile(content, Path(tmp) / name)
        try:
            if own or not original or language.other_eos():
                tokenizer = load_tokenizer(Path(tmp), "hf")
            else:
                tokenizer = load_tokenizer(Path(tmp))
        except UserError as e:
            raise UserError(str(e).replace(tmp, language.tokenizer_origin)) from e
        chat = string_format(variant, settings)
        if own and isinstance(tokenizer, HfTokenizer):
            try:
                chat = tokenizer_format(tokenizer)
                notes.append(
                    "prompts are rendered by the language model's own chat template: "
                    f"{chat['prompt_template']!r}"
                )
            except UserError as e:
                if "chat_template" in settings:
                    raise UserError(f"--set chat_template={settings['chat_template']}: {e}") from e
                notes.append(
                    f"the chat template of {language.tokenizer_origin} cannot be used ({e}); "
                    f"prompts have the format {chat['chat_template']}: {chat['prompt_template']!r}"
                )
                own = False
        elif not settings.keys() & {"chat_template", "prompt_template"}:
            if named := language.unused_templates():
                what = f"chat templates named {', '.join(named)}, but none named default"
            elif tokenizer.kind == "hf" and not language.chat_template():
                what = "no chat template of its own"
            elif language.chat_template():
                what = (
                    "a chat template, which this variant was not trained with (--set "
                    "chat_template=tokenizer uses it)"
                )
            else:  # LLaMA itself
                what = ""
            if what:
                notes.append(
                    f"{language.tokenizer_origin} has {what}; prompts have the format "
                    f"{chat['chat_template']}: {chat['prompt_template']!r}"
                )
        ends: tuple[int, ...] = ()
        if own:  # the other formats have stops of their own
            ends = other_end_ids(language.end_ids, tokenizer.eos_id, tokenizer, notes)
        config = TokenizerConfig(
            tokenizer.kind, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, own, ends
        )
        return config, tokenizer.vocab_size, chat


def _config_values(
    name: str,
    variant: Variant,
    inputs: BuildInputs,
    language: LanguageModelFiles,
    settings: dict[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    """ModelConfig fields, from the variant, the tensor shapes and the language model's config."""
    vision = inputs.vision.sizes.get("vision") or vision_config(
        inputs.vision.shapes("vit."),
        inputs.vision.label,
        spare_block=inputs.vision.table is EVA,
        scale=variant.image_scale,
        settings=settings,
    )
    qformer = None
    if inputs.qformer is not None:
        qformer = inputs.qformer.sizes.get("qformer") or qformer_config(
            inputs.qformer.shapes("qformer."), inputs.qformer.label, settings
        )
    llm = asdict(llm_config(language.config, language.config_label, notes))
    resolve_tied_embeddings(llm, inputs.llm, notes)
    values: dict[str, Any] = {
        "variant": name,
        "vision": dict(vision),
        "qformer": qformer and dict(qformer),
        "llm": llm,
        "lora": _lora_values(variant, inputs.checkpoint, settings),
        "merge_patches": variant.merge_patches,
        "max_text_length": variant.max_text_length,
    }
    return values


def _lora_values(
    variant: Variant, checkpoint: MappedCheckpoint | None, settings: dict[str, Any]
) -> dict[str, Any] | None:
    """LoraConfig fields; None without LoRA."""
    recorded = checkpoint.sizes.get("lora") if checkpoint is not None else None
    if not (variant.lora or recorded or any(key.startswith("lora.") for key in settings)):
        return None
    values = asdict(LoraConfig()) | (recorded or {})
    if checkpoint is not None and (shapes := lora_shapes(checkpoint)):
        values |= lora_config(shapes, checkpoint.label)
    return values


def _assign_sources(
    config: ModelConfig, inputs: BuildInputs, notes: list[str]
) -> dict[str, ParameterSource]:
    """Parameter -> source. Parameters of a fine-tuned checkpoint replace the frozen originals."""
    sources = inputs.vision.parameters("vit.") | inputs.llm.parameters("llm.")
    if inputs.qformer is not None:
        sources |= inputs.qformer.parameters("qformer.")
    # BLIP-2's ln_vision goes with its Q-Former only; our own encoders were trained with theirs.
    native = inputs.vision.table is NATIVE
    norm = inputs.vision if native or inputs.qformer is None else inputs.qformer
    sources |= norm.parameters("ln_vision.")
    if inputs.checkpoint is not None:
        trained = inputs.checkpoint.parameters()
        if vision := [n for n in trained if part_of(n) in ("vit", "qformer")]:
            notes.append(
                f"{len(vision)} vision parameters come from {inputs.checkpoint.label}, "
                "not the originals"
            )
        sources |= trained
    _drop_unused(config, sources, notes)
    return sources


def _drop_unused(
    config: ModelConfig, sources: dict[str, ParameterSource], notes: list[str]
) -> None:
    """Drop ViT blocks past `depth`."""
    depth = config.vision.depth
    blocks = {n: int(n.split(".")[2]) for n in sources if n.startswith("vit.blocks.")}
    if unused := sorted({i for i in blocks.values() if i >= depth}):
        numbers = ", ".join(map(str, unused))
        notes.append(f"vision block {numbers} of the file is not used (vision.depth={depth})")
    for name, i in blocks.items():
        if i >= depth:
            del sources[name]


def _new_parameters(
    shapes: dict[str, tuple[int, ...]],
    sources: dict[str, ParameterSource],
    inputs: BuildInputs,
    notes: list[str],
) -> list[str]:
    """Parameters to initialize: projection and LoRA without --checkpoint, a plain ViT's ln_vision."""
    missing = [n for n in shapes if n not in sources]
    parts = {"projection", "lora"} if inputs.checkpoint is None else set()
    if inputs.checkpoint is not None and not lora_shapes(inputs.checkpoint):
        parts = {"lora"}  # added by --set
    new = [n for n in missing if part_of(n) in parts]
    if inputs.checkpoint is None:
        notes.append("no --checkpoint: the projection is new and must be trained first")
    if any(part_of(n) == "lora" for n in new):
        notes.append("LoRA is new: it changes nothing until it is trained")
    if inputs.qformer is None:  # the original then never loads ln_vision: gamma 1, beta 0
        new += [n for n in missing if n.startswith("ln_vision.")]
    return new
