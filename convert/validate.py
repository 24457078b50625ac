"""Checks that the input files belong together; messages name the likely mistake."""

from collections.abc import Collection, Mapping

from convert.sources import BuildInputs, ParameterSource, lora_shapes
from minigpt4_jax.checkpoint.parameters import part_of
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError

FLOATS = ("float16", "bfloat16", "float32")


def check_vocabulary(config: ModelConfig, inputs: BuildInputs, tokens: int) -> None:
    """UserError unless tokenizer, config.json and embedding agree. tokens: of the tokenizer."""
    label, vocab = inputs.llm.label, config.llm.vocab
    rows = inputs.llm.shapes("llm.embed").get("llm.embed", (vocab,))[0]
    if rows != vocab:
        raise UserError(
            f"{label}: config.json says {vocab} tokens, the embedding has {rows}: the files do not "
            f"belong together (give --set llm.vocab={rows} if they do)"
        )
    check_tokens(vocab, tokens, label)


def check_tokens(vocab: int, tokens: int, label: str) -> None:
    """UserError if a tokenizer of this many tokens cannot belong to a model of `vocab` tokens."""
    if tokens > vocab:
        raise UserError(
            f"{label}: the tokenizer has {tokens} tokens, the model only {vocab}: "
            "it is another model's tokenizer"
        )
    if vocab - tokens > max(1024, vocab // 10):  # padding of the vocabulary is less
        raise UserError(
            f"{label}: the model has {vocab} tokens, the tokenizer only {tokens}: "
            "it is another model's tokenizer"
        )


def check_fine_tuned(config: ModelConfig, inputs: BuildInputs) -> None:
    """UserError unless the fine-tuned checkpoint belongs to this variant and language model."""
    checkpoint = inputs.checkpoint
    if checkpoint is None:
        return
    label, shapes = checkpoint.label, checkpoint.shapes()
    lora = lora_shapes(checkpoint)
    if lora and config.lora is None:
        raise UserError(
            f"{label} has {len(lora)} LoRA weights ({checkpoint.mapped[min(lora)].key}, ...), which "
            f"{config.variant} would lose: for a minigpt-v2 checkpoint give --variant=minigpt-v2, "
            "otherwise --set lora.alpha=N with the value it was trained with"
        )
    if config.variant == "minigpt-v2" and config.lora is not None and not lora:
        raise UserError(
            f"{label} has no LoRA weights, which {config.variant} needs: it is a MiniGPT-4 "
            "checkpoint, give --variant=minigpt4-llama2 or minigpt4-vicuna"
        )
    if "projection.weight" not in shapes:
        raise UserError(f"{label} has no llama_proj.weight: it is not a MiniGPT-4 checkpoint")
    if len(shapes["projection.weight"]) != 2:
        raise UserError(
            f"{label}: llama_proj.weight has shape {shapes['projection.weight']}; expected a matrix"
        )
    n_out, n_in = shapes["projection.weight"]
    if n_out != config.llm.width:
        raise UserError(
            f"{label} was trained for a language model of width {n_out}, {inputs.llm.label} has "
            f"width {config.llm.width}: use the language model it was trained with"
        )
    if n_in != config.projection_in:
        cause = _explain_input_width(config, inputs, n_in)
        raise UserError(f"{label} projects from width {n_in}, but {cause}")


def _explain_input_width(config: ModelConfig, inputs: BuildInputs, n_in: int) -> str:
    four_patches = 4 * config.vision.width
    if inputs.qformer is not None:
        actual = f"the Q-Former of {config.variant} has width {config.projection_in}"
        if n_in == four_patches:
            return (
                f"{actual}: give --variant=minigpt4-llama2, whose four patches have {four_patches}"
            )
        return f"{actual}: check {inputs.qformer.label}"
    actual = f"{config.merge_patches} patches of {config.variant} have {config.projection_in}"
    if n_in < config.projection_in:
        return (
            f"{actual}: it may be a minigpt4-vicuna checkpoint; if not, check {inputs.vision.label}"
        )
    return f"{actual}: check {inputs.vision.label}"


def shape_problems(
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, ParameterSource],
    new_parameters: Collection[str],
    inputs: BuildInputs,
) -> list[str]:
    """A message for each parameter without a source, unexpected parameter, and wrong shape or dtype.

    shapes: of all parameters of the model.
    """
    missing = [
        _missing(name, inputs)
        for name in shapes
        if name not in sources and name not in new_parameters
    ]
    return missing + source_problems(shapes, sources)


def source_problems(
    shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, ParameterSource]
) -> list[str]:
    """A message for each unexpected parameter, wrong shape and dtype of a source."""
    problems = []
    for name, source in sources.items():
        tensor = source.tensor
        if name not in shapes:
            problems.append(f"{source.label} is not a part of this model")
        elif not source.transform.fits(tensor.shape, shapes[name]):
            problems.append(f"{source.label} has shape {tensor.shape}, expected {shapes[name]}")
        elif tensor.dtype.name not in (*FLOATS, "float64"):
            problems.append(
                f"{source.label} has dtype {tensor.dtype.name}, expected floating point numbers"
            )
    return problems


def _missing(name: str, inputs: BuildInputs) -> str:
    """The message about a parameter without a source: the file it should be in, and its key there."""
    checkpoints = {
        "vit": (inputs.vision,),
        "qformer": (inputs.qformer, inputs.checkpoint),
        "llm": (inputs.llm,),
    }.get(part_of(name), (inputs.checkpoint,))
    if name.startswith("ln_vision."):
        checkpoints = (inputs.qformer, inputs.vision)
    for checkpoint in checkpoints:
        if checkpoint is not None and (key := checkpoint.key_of(name)):
            return f"{checkpoint.label} has no {key}"
    return f"{name} is in no file"
