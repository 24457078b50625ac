"""Options shared by the commands that generate answers: how to load the model, how to generate."""

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

from minigpt4_jax.errors import Parser, UserError

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model


class Option(NamedTuple):
    """A field of GenerationConfig that can be set on the command line."""

    type: type[int] | type[float]
    help: str


GENERATION_OPTIONS = {
    "temperature": Option(float, "0 is greedy"),
    "top_p": Option(float, "1 is off"),
    "top_k": Option(int, "0 is off"),
    "min_p": Option(float, "0 is off"),
    "repetition_penalty": Option(float, "1 is off"),
    "min_new_tokens": Option(int, "0 is off"),
    "max_new_tokens": Option(int, "tokens of an answer at most"),
    "seed": Option(int, "of random sampling"),
}


def make_parser(command: str, description: str) -> Parser:
    """A parser with --model and how to load it."""
    p = Parser(prog=f"python -m minigpt4_jax.{command}", description=description)
    p.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="model directory, or its Hugging Face id: ORG/NAME or ORG/NAME@REVISION",
    )
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the large matrices")
    p.add_argument("--quantize", choices=("int8", "int4"), help="quantize them while loading")
    p.add_argument("--kv-cache", choices=("int8",), help="store keys and values in 8 bits")
    p.add_argument(
        "--mesh", metavar="SIZES", help="devices to use, as data:2,model:4, or auto for all of them"
    )
    p.add_argument(
        "--allow-nonfinite", action="store_true", help="load weights that are NaN or infinite"
    )
    p.add_argument("--no-exif", dest="exif", action="store_false",
                   help="use images as they are stored, as the original; by default they are "
                   "rotated as their EXIF orientation says")  # fmt: skip
    p.add_argument("--system", metavar="TEXT", help="replaces the template's system message")
    p.add_argument("--template", metavar="NAME", help="chat template, by default the model's")
    p.add_argument(
        "--no-extra-bos", dest="extra_bos", action="store_false",
        help="omit the second BOS that released Llama-2 and MiniGPT-v2 weights are used with",
    )  # fmt: skip
    return p


def add_generation_options(p: Parser, defaults: str) -> None:
    """Add GENERATION_OPTIONS; `defaults` says in the help what their defaults are."""
    group = p.add_argument_group(f"generation ({defaults})")
    for name, option in GENERATION_OPTIONS.items():
        group.add_argument(f"--{name}", type=option.type, help=option.help)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The generation options that are on the command line."""
    values = {name: getattr(args, name) for name in GENERATION_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def default_options() -> dict[str, Any]:
    """The defaults of `GenerationConfig`."""
    from minigpt4_jax.inference.generation_config import GenerationConfig

    return {f.name: f.default for f in fields(GenerationConfig) if f.name in GENERATION_OPTIONS}


def parse_option(text: str) -> tuple[str, Any]:
    """ "temperature=0.2" -> ("temperature", 0.2). UserError: not NAME=VALUE, unknown, not a number."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or name not in GENERATION_OPTIONS:
        known = ", ".join(GENERATION_OPTIONS)
        raise UserError(f"{text!r}: expected NAME=VALUE with one of the names {known}")
    number = GENERATION_OPTIONS[name].type
    try:
        return name, number(value)
    except ValueError:
        expected = "a whole number" if number is int else "a number"
        raise UserError(f"{name}={value}: expected {expected}") from None


def load_model(args: argparse.Namespace) -> "Model":
    """Load the model that the command line names."""
    from minigpt4_jax.inference import model

    return model.load(
        args.model, args.dtype, quantize=args.quantize, kv_cache=args.kv_cache, mesh=args.mesh,
        allow_nonfinite=args.allow_nonfinite, exif=args.exif,
    )  # fmt: skip
