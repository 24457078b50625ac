"""python -m convert build | export | merge | unmerge | inspect: see `python -m convert build --help`."""

import argparse
import math
import signal
import sys
from pathlib import Path
from typing import NoReturn

from minigpt4_jax import errors
from minigpt4_jax.config import QUANTIZATIONS, VARIANTS
from minigpt4_jax.errors import Parser

_FLOATS = ("float32", "bfloat16", "float16")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m convert", description="Convert weights to and from a model directory."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    b = commands.add_parser(
        "build", help="make a model directory from checkpoints",
        description="Make a model directory. Sources may be .pth/.bin (no pickle code is run), "
        ".safetensors, sharded directories, and GGUF for the language model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_BUILD_NOTES,
    )  # fmt: skip
    b.add_argument(
        "--variant", default=VARIANTS[0], help=f"{', '.join(VARIANTS)} (default: %(default)s)"
    )
    b.add_argument(
        "--llm", type=Path, required=True, help="language model: Hugging Face directory or .gguf"
    )
    b.add_argument(
        "--out", type=Path, required=True, help="model directory to make; must not exist"
    )
    b.add_argument(
        "--vision",
        type=Path,
        help="eva_vit_g.pth, or this project's .safetensors or model directory",
    )
    b.add_argument("--qformer", type=Path, help="blip2_pretrained_flant5xxl.pth, or as --vision")
    b.add_argument("--checkpoint", type=Path, help="fine-tuned MiniGPT-4 or -v2; without it the "
                   "projection is new, to be trained")  # fmt: skip
    b.add_argument("--llm-delta", type=Path, help="Vicuna delta, added to the LLaMA in --llm")
    b.add_argument(
        "--tokenizer", type=Path, help="directory of tokenizer files, instead of --llm's own"
    )
    b.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
                   help="override an architecture value; may be repeated")  # fmt: skip
    b.add_argument(
        "--llm-dtype",
        choices=_FLOATS,
        help="store the language model's matrices so; default: as they are (quantized: float32)",
    )
    b.add_argument(
        "--quantize",
        choices=(*QUANTIZATIONS, "keep"),
        help="round the matrices of language model and vision encoder to this (embedding: int8); "
        "keep: a GGUF file's stay as they are",
    )
    b.add_argument("--seed", type=int, default=0, help="for a new projection (default: 0)")
    b.add_argument("--projection-scale", type=_factor, default=1.0, metavar="FACTOR",
                   help="on a new projection's first values, which are torch.nn.Linear's: below 1 "
                   "visual tokens begin nearer the size of word embeddings")  # fmt: skip

    e = commands.add_parser("export", help="write the trained part as the original's .pth")
    e.add_argument(
        "--model", type=Path, required=True, help="model directory, or one that training wrote"
    )
    e.add_argument("--out", type=Path, required=True, help="file to write")

    m = commands.add_parser(
        "merge", help="add LoRA to the weights it is on: a model without LoRA that says the same"
    )
    m.add_argument("--model", type=Path, required=True, help="model directory with LoRA")
    u = commands.add_parser("unmerge", help="take merged LoRA out of the weights again")
    u.add_argument("--model", type=Path, required=True, help="directory that merge wrote")
    u.add_argument("--lora", type=Path, required=True, help="the one it was made of")
    for command in (m, u):
        command.add_argument("--out", type=Path, required=True, help="model directory to make")
        command.add_argument(
            "--dtype", choices=_FLOATS, default="float32", help="store changed matrices so "
            "(default: %(default)s; a 16-bit type may lose a small adapter)"
        )  # fmt: skip

    i = commands.add_parser("inspect", help="say what a model directory holds")
    i.add_argument("model", type=Path)
    i.add_argument("--json", action="store_true", help="the same as JSON")
    return parser


def _factor(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


_BUILD_NOTES = """\
--set keys (the rest of the configuration works too, a wrong key names the nearest):
  image_size, vision.depth, vision.heads, qformer.heads, max_text_length, end_symbol,
  prompt_template, chat_template, llm.rope_theta, ...
  lora.rank, lora.alpha, lora.dropout, lora.targets=q,v (of q k v o gate up down): one of them gives a
  model adapters that its variant has not; alpha is not told by a checkpoint's shapes.
Heads are needed for encoders that are not of the released width; everything else the shapes tell.
--quantize=keep: blocks of the types Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K and Q8_0 keep their values
  to the bit (4 bits in half a byte, more in one); matrices of other types are rounded to int8.
Without --vision the small demonstration encoder in this package is used (it knows drawn shapes).
Without --checkpoint the projection is new. A language model with a chat format of its own (ChatML,
Llama 3, Mistral) is prompted in it."""


def main(argv: list[str] | None = None) -> None:
    """Run one command; `argv` is what follows `python -m convert`. UserError for a mistake."""
    args = _parser().parse_args(argv)
    if args.command == "build":
        from convert.build import build
        from convert.build_plan import Request

        fields = {k: v for k, v in vars(args).items() if k != "command"}
        build(Request(**fields))
    elif args.command == "export":
        from convert.export import export

        export(args.model, args.out)
    elif args.command == "merge":
        from convert.merge import merge

        merge(args.model, args.out, args.dtype)
    elif args.command == "unmerge":
        from convert.merge import unmerge

        unmerge(args.model, args.lora, args.out, args.dtype)
    else:
        from convert.inspect import inspect

        inspect(args.model, as_json=args.json)


def run(argv: list[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    # SIGTERM as an exception, so that half-written output is removed; quiet when piped into head.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    errors.run(lambda: main(argv))
