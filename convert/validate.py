"""Files that do not belong together, named by the likely mistake."""

from collections.abc import Collection, Mapping

from convert.key_mapping import Match
from convert.sources import Source, Sources, lora_shapes
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.errors import UserError

FLOATS = ("float16", "bfloat16", "float32")


def check_language(config: ModelConfig, s: Sources, pieces: int) -> None:
    """UserError unless the tokenizer fits the vocabulary, and the vocabulary the embedding."""
    where, vocab = s.llm.where, config.llm.vocab
    rows = s.llm.shapes("llm.embed").get("llm.embed", (vocab,))[0]
    if rows != vocab:
        raise UserError(
            f"{where}: config.json says {vocab} tokens, the embedding has {rows}: the files do not "
            f"belong together (give --set llm.vocab={rows} if they do)"
        )
    if pieces > vocab:
        raise UserError(
            f"{where}: the tokenizer has {pieces} tokens, the model only {vocab}: "
            "it is another model's tokenizer"
        )
    if vocab - pieces > max(1024, vocab // 10):  # rows that only pad the vocabulary are fewer
        raise UserError(
            f"{where}: the model has {vocab} tokens, the tokenizer only {pieces}: "
            "it is another model's tokenizer"
        )


def check_trained(config: ModelConfig, s: Sources) -> None:
    """UserError unless the fine-tuned checkpoint belongs to this variant and language model."""
    if s.checkpoint is None:
        return
    where, shapes = s.checkpoint.where, s.checkpoint.shapes()
    lora = lora_shapes(s.checkpoint)
    if lora and config.lora is None:
        raise UserError(
            f"{where} holds {len(lora)} LoRA weights ({s.checkpoint.found[min(lora)].key}, ...), which "
            f"{config.variant} would lose: for a minigpt-v2 checkpoint give --variant=minigpt-v2, "
            "for one with LoRA of its own --set lora.alpha=N, as it was trained with"
        )
    if config.variant == "minigpt-v2" and config.lora is not None and not lora:
        raise UserError(
            f"{where} holds no LoRA weights, which {config.variant} needs: it is a MiniGPT-4 "
            "checkpoint, give --variant=minigpt4-llama2 or minigpt4-vicuna"
        )
    if "projection.weight" not in shapes:
        raise UserError(f"{where} holds no llama_proj.weight: it is not a MiniGPT-4 checkpoint")
    if len(shapes["projection.weight"]) != 2:
        raise UserError(f"{where}: llama_proj.weight has shape {shapes['projection.weight']}")
    n_out, n_in = shapes["projection.weight"]
    if n_out != config.llm.width:
        raise UserError(
            f"{where} was trained for a language model of width {n_out}, {s.llm.where} has width "
            f"{config.llm.width}: use the language model it was trained with"
        )
    if n_in != config.projection_in:
        raise UserError(f"{where} projects from width {n_in}, but {_other_width(config, s, n_in)}")


def _other_width(config: ModelConfig, s: Sources, n_in: int) -> str:
    joined = 4 * config.vision.width
    if s.qformer is not None:
        have = f"the Q-Former of {config.variant} gives {config.projection_in}"
        if n_in == joined:
            return f"{have}: give --variant=minigpt4-llama2, whose patches give {joined}"
        return f"{have}: check {s.qformer.where}"
    have = f"{config.merge_patches} patches of {config.variant} give {config.projection_in}"
    if n_in < config.projection_in:
        return f"{have}: it may be a minigpt4-vicuna checkpoint; if not, check {s.vision.where}"
    return f"{have}: check {s.vision.where}"


def shape_problems(
    wanted: Mapping[str, tuple[int, ...]],
    origin: Mapping[str, tuple[Source, Match]],
    fresh: Collection[str],
) -> list[str]:
    """A line for each parameter without source, key without place, and unfit shape or type."""
    problems = [f"{n} is in no file" for n in wanted if n not in origin and n not in fresh]
    for name, (source, m) in origin.items():
        tensor = source.reader.tensors[m.key]
        where = f"{source.where}: {m.key}"
        if name not in wanted:
            problems.append(f"{where} has no place in this model")
        elif not m.transform.fits(tensor.shape, wanted[name]):
            problems.append(f"{where} has shape {tensor.shape}, expected {wanted[name]}")
        elif tensor.dtype.name not in (*FLOATS, "float64"):
            problems.append(f"{where} holds {tensor.dtype.name}, expected floating point numbers")
    return problems
