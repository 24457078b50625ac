"""Options shared by the commands that generate answers: how to load the model, how to generate."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from minigpt4_jax.config import KV_CACHES, ModelConfig
from minigpt4_jax.errors import Parser, UserError
from minigpt4_jax.utils.text import spelling_hint

if TYPE_CHECKING:
    from minigpt4_jax.inference.generation_config import GenerationConfig
    from minigpt4_jax.inference.loading import Loading
    from minigpt4_jax.inference.model import Model


class Option(NamedTuple):
    """A field of GenerationConfig that can be set on the command line."""

    type: type[int] | type[float] | type[str] | type[bool]
    help: str
    repeated: bool = False  # a list of them


# Every field but `template` (--raw, --template) and `extra_bos` (--no-extra-bos); a test compares them.
GENERATION_OPTIONS = {
    "temperature": Option(float, "0 is greedy"),
    "top_p": Option(float, "1 is off"),
    "top_k": Option(int, "0 is off"),
    "min_p": Option(float, "0 is off"),
    "repetition_penalty": Option(float, "1 is off"),
    "frequency_penalty": Option(float, "for each time that a token was generated; 0 is off"),
    "presence_penalty": Option(float, "of tokens that were generated; 0 is off"),
    "min_new_tokens": Option(int, "0 is off"),
    "max_new_tokens": Option(int, "tokens of an answer at most"),
    "seed": Option(int, "of random sampling"),
    "num_beams": Option(int, "more than 1 is beam search, which does not sample"),
    "length_penalty": Option(float, "of beam search: above 0 prefers long answers"),
    "early_stopping": Option(bool, "end a search at the first num_beams finished answers"),
    "num_return_sequences": Option(int, "answers of a beam search, best first"),
    "stop": Option(str, "text that ends an answer; may be repeated", repeated=True),
    "stop_ids": Option(int, "token id that ends an answer; may be repeated", repeated=True),
    "context": Option(
        int, "cut prompts on the left so that prompt and answer fit into this many tokens"
    ),
    "compat": Option(bool, "count the BOS before an answer in penalties, as the original"),
}
BEAM_OPTIONS = ("length_penalty", "early_stopping")
RANDOM_OPTIONS = ("top_p", "top_k", "min_p", "seed")
# excluded by beam search
SAMPLING_OPTIONS = (
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
)  # fmt: skip


# command's default of `exif` -> help of --no-exif
_NO_EXIF_HELP = {
    True: "use images as they are stored, as the original; by default they are rotated as their EXIF "
    "orientation says",
    False: "use images as they are stored, as the original; this is the default of this command",
}


def make_parser(
    command: str, description: str, *, model_required: bool = True, exif: bool | None = True
) -> Parser:
    """A parser with --model and how to load it. exif: whether images are rotated by default; None: the
    command reads no images."""
    p = Parser(prog=f"python -m minigpt4_jax.{command}", description=description)
    p.add_argument(
        "--model",
        required=model_required,
        metavar="DIR",
        help="model directory, or its Hugging Face id: ORG/NAME or ORG/NAME@REVISION",
    )
    p.add_argument(
        "--base",
        metavar="DIR",
        help="the model that --model was trained on, if it is no longer where model.json says",
    )
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the large matrices")
    p.add_argument("--quantize", choices=("int8", "int4"), help="quantize them while loading")
    p.add_argument("--kv-cache", choices=KV_CACHES, help="store keys and values in 8 bits")
    p.add_argument(
        "--mesh", metavar="SIZES", help="devices to use, as data:2,model:4, or auto for all of them"
    )
    p.add_argument(
        "--allow-nonfinite", action="store_true", help="load weights that are NaN or infinite"
    )
    if exif is None:
        p.set_defaults(exif=True)
    else:
        p.add_argument("--no-exif", dest="exif", action="store_false", default=exif,
                       help=_NO_EXIF_HELP[exif])  # fmt: skip
    p.add_argument("--system", metavar="TEXT", help="replaces the template's system message")
    p.add_argument("--template", metavar="NAME", help="chat template, by default the model's")
    p.add_argument(
        "--no-extra-bos", dest="extra_bos", action="store_false",
        help="omit the second BOS that released Llama-2 and MiniGPT-v2 weights are used with",
    )  # fmt: skip
    return p


def add_generation_options(p: Parser, defaults: str, *, excluded: Sequence[str] = ()) -> None:
    """Add GENERATION_OPTIONS; `defaults` says in the help what their defaults are."""
    group = p.add_argument_group(f"generation ({defaults})")
    for name, option in GENERATION_OPTIONS.items():
        if name in excluded:
            p.set_defaults(**{name: None})
        elif option.type is bool:
            group.add_argument(f"--{name}", action="store_true", default=None, help=option.help)
        else:
            action = "append" if option.repeated else "store"
            group.add_argument(f"--{name}", type=option.type, action=action, help=option.help)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The generation options that are on the command line."""
    values = {name: getattr(args, name, None) for name in GENERATION_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def default_options() -> dict[str, Any]:
    """The defaults of `GenerationConfig`."""
    from minigpt4_jax.inference.generation_config import GenerationConfig

    return {f.name: f.default for f in fields(GenerationConfig) if f.name in GENERATION_OPTIONS}


def unused_options(given: Mapping[str, Any], config: "GenerationConfig") -> list[str]:
    """A line for each of the given options that has no effect beside the others."""
    if config.num_beams > 1:
        return []
    lines = [
        f"{name} has no effect without beam search: set num_beams above 1"
        for name in BEAM_OPTIONS
        if name in given
    ]
    if config.temperature == 0:
        lines += [
            f"{name} has no effect at temperature 0, which is greedy: set temperature above 0"
            for name in RANDOM_OPTIONS
            if given.get(name)
            not in (None, getattr(type(config), name))  # off, as in chat's advice
        ]
    return lines


def parse_options(words: Sequence[str], excluded: Sequence[str] = ()) -> dict[str, Any]:
    """["temperature=0.2", "top_k", "5"] -> {"temperature": 0.2, "top_k": 5}. excluded: names not offered.

    UserError: no NAME=VALUE or NAME VALUE, an unknown name, not a number, a single value given twice.
    """
    pairs: list[str] = []
    for word in words:
        # NAME VALUE, NAME =VALUE, NAME = VALUE, NAME= VALUE
        if pairs and (word.startswith("=") or "=" not in pairs[-1] or pairs[-1].endswith("=")):
            separator = "" if word.startswith("=") or pairs[-1].endswith("=") else "="
            pairs[-1] += separator + word
        else:
            pairs.append(word)
    options: dict[str, Any] = {}
    for name, value in (_parse_option(pair, excluded) for pair in pairs):
        if name in options and not GENERATION_OPTIONS[name].repeated:
            raise UserError(f"{name} is given twice; expected one value")
        if name in options and value:
            value = (*options[name], *value)
        options[name] = value
    return options


def _parse_option(text: str, excluded: Sequence[str]) -> tuple[str, Any]:
    name, equals, value = (part.strip() for part in text.partition("="))
    name = name.removeprefix("--").replace("-", "_")
    if name not in GENERATION_OPTIONS:
        known = [option for option in GENERATION_OPTIONS if option not in excluded]
        raise UserError(
            f"{text!r}: expected NAME=VALUE with the name of an option; {spelling_hint(name, known)}"
        )
    if not equals:
        raise UserError(f"{name} has no value; expected {name}=VALUE")
    option = GENERATION_OPTIONS[name]
    if option.repeated:
        values = [value] if option.type is str else value.split(",")
        return name, tuple(_parse_value(name, one, option.type) for one in values if one)
    return name, _parse_value(name, value, option.type)


def _parse_value(name: str, value: str, kind: Any) -> Any:
    words = {"true": True, "false": False}
    try:
        return words[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        expected = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise UserError(f"{name}={value}: expected {expected}") from None


def load_model(args: argparse.Namespace) -> "Model":
    """Load the model that the command line names. UserError: also options that do not fit it."""
    return begin_loading(args).finish()


def begin_loading(
    args: argparse.Namespace, options_of: Callable[[str], Mapping[str, Any]] | None = None
) -> "Loading":
    """As `load_model`, but the weights are not read yet. options_of: the generation options of a variant,
    with the command's own defaults; those on the command line that have no effect are told."""
    from minigpt4_jax.inference.loading import begin_loading

    _check_options_of_model(args, options_of)
    return begin_loading(
        args.model, args.dtype, quantize=args.quantize, kv_cache=args.kv_cache, mesh=args.mesh,
        base=args.base, allow_nonfinite=args.allow_nonfinite, exif=args.exif,
    )  # fmt: skip


def check_kind(model_dir: str, *, keeps_images: bool = False) -> None:
    """Before anything is loaded. keeps_images: the command encodes images by themselves, to use them for
    several questions. UserError: a model that answers no questions, or whose images it cannot keep."""
    from minigpt4_jax.checkpoint.model_directory import read_config

    config = read_config(model_dir)
    if config.is_stage1:
        raise UserError(
            f"{model_dir}: {config.variant} has no language model, so it answers no questions; from Python "
            "it compares images with texts and writes captions (minigpt4_jax.load; docs/guides/blip2.md)"
        )
    if keeps_images and config.reads_instruction:
        raise UserError(
            f"{model_dir}: {config.variant} encodes an image anew for every question, and this command keeps "
            "encoded images; use chat, batch or evaluate, or another model"
        )


def check_fits(options: Mapping[str, Any], config: ModelConfig) -> None:
    """UserError: generation options that do not fit the model or each other. Missing ones are None."""
    limit, length = options.get("max_new_tokens"), config.llm.max_length
    if limit is not None and limit >= length:
        raise UserError(
            f"max_new_tokens {limit}: the language model's context has {length} tokens, for prompt and "
            "answer together; lower it"
        )
    least, context = options.get("min_new_tokens") or 0, options.get("context")
    if limit is not None and least > limit:
        raise UserError(
            f"min_new_tokens {least}: is more than max_new_tokens {limit}; lower it, or raise that"
        )
    if context is not None and limit is not None and context <= limit:
        raise UserError(
            f"context {context}: has no room for a prompt beside max_new_tokens {limit}; raise it, or "
            "lower that"
        )
    if context is not None and context > length:
        raise UserError(
            f"context {context}: the language model's has {length} tokens; lower it or leave it out"
        )
    for token in options.get("stop_ids") or ():
        if not 0 <= token < config.llm.vocab:
            raise UserError(
                f"stop_ids {token}: expected a token id of this model, 0 to {config.llm.vocab - 1}"
            )


def note(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def _check_options_of_model(
    args: argparse.Namespace, options_of: Callable[[str], Mapping[str, Any]] | None
) -> None:
    """Before the weights are read, which may take minutes. UserError: as `check_kind` and `check_fits`; the
    model's chat template cannot be used, or refuses the system message."""
    from minigpt4_jax.checkpoint.model_directory import read_config, tokenizer_dir
    from minigpt4_jax.inference.generation_config import GenerationConfig
    from minigpt4_jax.processing.chat_templates import chat_format
    from minigpt4_jax.processing.tokenizer import load_tokenizer

    check_kind(args.model)
    config = read_config(args.model)
    given = given_options(args)
    options = given if options_of is None else options_of(config.variant)
    check_fits(options, config)
    if options_of is not None:
        for text in unused_options(given, GenerationConfig(**options)):
            note(f"note: {text}")
    if args.template is None and not args.system:
        return
    tokenizer = load_tokenizer(tokenizer_dir(args.model, args.base), config.tokenizer.kind)
    template = chat_format(config, tokenizer, args.template)
    if args.system:
        template.render([("?", None)], system=args.system)
