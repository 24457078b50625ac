"""What the commands that answer questions share: options for the model and for choosing tokens."""

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from minigpt4_jax.errors import Parser, UserError

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model

# Options of `Model.generate` that a command line can say, with their types.
CHOICES: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "1 is off"),
    "top_k": (int, "0 is off"),
    "min_p": (float, "0 is off"),
    "repetition_penalty": (float, "1 is off"),
    "min_new_tokens": (int, "0 is off"),
    "max_new_tokens": (int, "length of an answer at most"),
    "seed": (int, "of random choice"),
}


def parser(prog: str, description: str) -> Parser:
    """A parser with --model and how to hold it."""
    p = Parser(prog=f"python -m minigpt4_jax.{prog}", description=description)
    p.add_argument("--model", required=True, metavar="DIR", help="model directory")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the large matrices")
    p.add_argument("--quantize", choices=("int8", "int4"), help="round them while loading")
    p.add_argument("--kv-cache", choices=("int8",), help="hold keys and values in 8 bits")
    p.add_argument(
        "--mesh", metavar="SIZES", help="devices to use, as data:2,model:4, or auto for all of them"
    )
    p.add_argument("--system", metavar="TEXT", help="replaces the template's system message")
    p.add_argument("--template", metavar="NAME", help="chat template, by default the model's")
    p.add_argument(
        "--no-extra-bos", dest="extra_bos", action="store_false",
        help="leave out the second BOS that released Llama-2 and MiniGPT-v2 weights are used with",
    )  # fmt: skip
    return p


def add_choices(p: Parser, defaults: str) -> None:
    """Options for choosing tokens; `defaults` says where theirs are from."""
    group = p.add_argument_group(f"choosing tokens ({defaults})")
    for name, (kind, meaning) in CHOICES.items():
        group.add_argument(f"--{name}", type=kind, help=meaning)


def chosen(args: argparse.Namespace) -> dict[str, Any]:
    """The options for choosing tokens that were given."""
    return {name: v for name in CHOICES if (v := getattr(args, name)) is not None}


def load(args: argparse.Namespace) -> "Model":
    from minigpt4_jax.inference import model
    from minigpt4_jax.utils.compilation_cache import enable_compilation_cache

    enable_compilation_cache()
    return model.load(
        args.model, args.dtype, quantize=args.quantize, kv_cache=args.kv_cache, mesh=args.mesh
    )


def parse_choice(text: str) -> tuple[str, Any]:
    """ "temperature=0.2" -> ("temperature", 0.2). UserError: not of this form, unknown, no number."""
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or name not in CHOICES:
        raise UserError(f"{text!r}: expected NAME=VALUE with a name of {', '.join(CHOICES)}")
    try:
        return name, CHOICES[name][0](value)
    except ValueError:
        kind = "a whole number" if CHOICES[name][0] is int else "a number"
        raise UserError(f"{name}={value}: expected {kind}") from None


def default_choices() -> dict[str, Any]:
    """What `Model.generate` takes where nothing is said."""
    from minigpt4_jax.inference.generation_config import GenerationConfig

    return {f.name: f.default for f in fields(GenerationConfig) if f.name in CHOICES}
