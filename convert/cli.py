"""The command line of `python -m convert`."""

import argparse
import math
import signal
import sys
from pathlib import Path
from typing import NoReturn, TypeAlias

from minigpt4_jax import errors
from minigpt4_jax.config import BLIP2_VARIANTS, QUANTIZATIONS, VARIANTS
from minigpt4_jax.errors import Parser
from minigpt4_jax.storage.hub import input_path

_FLOATS = ("float32", "bfloat16", "float16")
_EXPORT_FORMATS = ("pth", "huggingface")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m convert",
        description="Converts released checkpoints to a model directory and back.",
        epilog="python -m convert COMMAND --help describes the options of a command.",
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    _add_build(commands)
    _add_export(commands)
    _add_merge(commands)
    _add_unmerge(commands)
    _add_pack(commands)
    _add_inspect(commands)
    return parser


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


def _add_build(commands: Commands) -> None:
    b = commands.add_parser(
        "build",
        help="make a model directory from checkpoints",
        description="Makes a model directory from checkpoints. Accepted are .pth and .bin files (code "
        "in them is never run), .safetensors files, sharded Hugging Face directories, and GGUF files "
        "for the language model.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_BUILD_NOTES,
    )
    b.add_argument("--variant", default=VARIANTS[0], metavar="NAME",
                   help=f"the architecture: {', '.join((*VARIANTS, *BLIP2_VARIANTS))} "
                   "(default: %(default)s)")  # fmt: skip
    b.add_argument("--llm", type=input_path, metavar="PATH",
                   help="language model: a Hugging Face directory, a .gguf file, or a Hugging Face id, see "
                   "below")  # fmt: skip
    _add_out(b)
    b.add_argument("--vision", type=input_path, metavar="PATH",
                   help="vision encoder: eva_vit_g.pth, or a .safetensors file or model directory of "
                   "this project (default: the packaged demonstration encoder)")  # fmt: skip
    b.add_argument("--qformer", type=input_path, metavar="PATH",
                   help="Q-Former: blip2_pretrained_flant5xxl.pth, or a file or directory as for "
                   "--vision; for blip2-qformer also a directory of BERT, to start a new one")  # fmt: skip
    b.add_argument("--checkpoint", type=input_path, metavar="PATH",
                   help="fine-tuned MiniGPT-4 or MiniGPT-v2 checkpoint; for BLIP-2 a .pth of LAVIS or a "
                   "Hugging Face directory (default: none; the projection is initialized at random and "
                   "must be trained)")  # fmt: skip
    b.add_argument("--llm-delta", type=input_path, metavar="DIR",
                   help="Vicuna delta weights, added to the LLaMA weights of --llm")  # fmt: skip
    b.add_argument("--tokenizer", type=input_path, metavar="DIR",
                   help="directory with tokenizer files (default: those of --llm)")  # fmt: skip
    b.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
                   help="override a value of the model's configuration, see below; repeatable")  # fmt: skip
    b.add_argument("--llm-dtype", choices=_FLOATS,
                   help="store the language model's matrices in this dtype (default: that of the "
                   "file; float32 for quantized files)")  # fmt: skip
    b.add_argument("--quantize", choices=(*QUANTIZATIONS, "keep"),
                   help="quantize the matrices of the language model and the vision encoder; the "
                   "embedding always to int8. keep: use the quantized blocks of a GGUF file as they "
                   "are, see below")  # fmt: skip
    b.add_argument("--allow-nonfinite", action="store_true",
                   help="convert NaN and infinite values instead of refusing them")  # fmt: skip
    b.add_argument("--seed", type=int, default=0, metavar="N",
                   help="random seed for new weights (default: %(default)s)")  # fmt: skip
    b.add_argument("--projection-scale", type=_positive_number, default=1.0, metavar="FACTOR",
                   help="multiply the initial values of a new projection, which are those of "
                   "torch.nn.Linear; below 1, visual tokens start closer in size to the word "
                   "embeddings (default: 1)")  # fmt: skip


_BUILD_NOTES = """\
Keys of --set (any field of the configuration; an unknown key is answered with similar ones):
  image_size, vision.depth, vision.heads, qformer.heads, max_text_length, end_symbol,
  prompt_template, chat_template, llm.rope_theta, ...
  lora.rank, lora.alpha, lora.dropout, lora.targets=q,v (from q k v o gate up down): any of these adds
  LoRA to a variant without it. A checkpoint does not record alpha: give the value used in training.
Sizes follow from the shapes of the tensors, except the number of attention heads: give vision.heads
and qformer.heads for encoders whose width is not that of the released ones.

--quantize=keep: blocks of the types Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K and Q8_0 keep their exact
values (4-bit types take 4 bits a weight, the others 8); matrices of other types are rounded to int8.

Without --vision the packaged demonstration encoder is used; it only recognizes drawn shapes.
A language model with its own chat format (ChatML, Llama 3, Mistral) is prompted in that format.

Inputs may be Hugging Face ids: ORG/NAME or ORG/NAME@REVISION for --llm, --llm-delta and --tokenizer,
ORG/NAME:Q4_K_M or ORG/NAME/FILE for one file. What exists as a local path is preferred; hf://ORG/NAME is
always an id. Only the needed files are downloaded, into the cache of huggingface_hub (HF_HOME)."""


def _add_export(commands: Commands) -> None:
    e = commands.add_parser(
        "export",
        help="write the trained weights as a .pth file of the original, or BLIP-2 for transformers",
        description="Writes the trained weights (projection, LoRA and whatever else was trained) as "
        "a .pth file that the original implementation loads; with --format=huggingface a whole BLIP-2 "
        "model as a directory that transformers loads (Blip2ForConditionalGeneration, "
        "Blip2ForImageTextRetrieval, Blip2Processor).",
    )
    _add_model(e, "model directory, also one that training wrote")
    _add_base(e)
    e.add_argument("--out", type=Path, required=True, metavar="PATH",
                   help="the .pth file to write, or the directory, which must not exist")  # fmt: skip
    e.add_argument("--format", choices=_EXPORT_FORMATS, default=_EXPORT_FORMATS[0],
                   help="what to write: pth, or huggingface for blip2-opt, blip2-flant5 and "
                   "blip2-qformer (default: %(default)s)")  # fmt: skip
    e.add_argument("--overwrite", action="store_true",
                   help="replace --out if it exists (--format=pth only)")  # fmt: skip
    e.add_argument("--allow-nonfinite", action="store_true",
                   help="export NaN and infinite values instead of refusing them")  # fmt: skip


def _add_merge(commands: Commands) -> None:
    m = commands.add_parser(
        "merge",
        help="add LoRA to the weights it adapts",
        description="Adds LoRA to the weights it adapts: writes a model without LoRA that computes the "
        "same.",
    )
    _add_model(m, "model directory with LoRA")
    _add_base(m)
    _add_out(m)
    _add_dtype_of_sums(m)


def _add_unmerge(commands: Commands) -> None:
    u = commands.add_parser(
        "unmerge",
        help="subtract merged LoRA from the weights again",
        description="Subtracts merged LoRA from the weights again: writes a model with LoRA that "
        "computes the same.",
    )
    _add_model(u, "model directory that `merge` wrote")
    u.add_argument("--lora", type=input_path, required=True, metavar="DIR",
                   help="the model directory with LoRA that was merged")  # fmt: skip
    _add_base(u, "--lora")
    _add_out(u)
    _add_dtype_of_sums(u)


def _add_model(command: Parser, text: str) -> None:
    command.add_argument("--model", type=input_path, required=True, metavar="DIR", help=text)


def _add_base(command: Parser, of: str = "--model") -> None:
    command.add_argument("--base", type=input_path, metavar="DIR",
                         help=f"the model that {of} is based on, if it is no longer where model.json "
                         "says; its fingerprint is compared")  # fmt: skip


def _add_out(command: Parser) -> None:
    command.add_argument("--out", type=Path, required=True, metavar="DIR",
                         help="the model directory to write; must not exist")  # fmt: skip


def _add_dtype_of_sums(command: Parser) -> None:
    command.add_argument("--dtype", choices=_FLOATS, default="float32",
                         help="store the changed matrices in this dtype (default: %(default)s; "
                         "rounding to a 16-bit dtype may lose a small adapter)")  # fmt: skip


def _add_pack(commands: Commands) -> None:
    p = commands.add_parser(
        "pack",
        help="make one directory of a trained model and its base",
        description="Copies a trained model and the model it is based on into one directory, which can "
        "be moved and published.",
    )
    _add_model(p, "model directory that training wrote")
    _add_out(p)
    _add_base(p)
    p.add_argument("--merge-lora", action="store_true",
                   help="add LoRA to the weights it adapts (default: LoRA is kept)")  # fmt: skip
    p.add_argument("--dtype", choices=_FLOATS,
                   help="store the matrices of the frozen parts in this dtype (default: as they are; "
                   "merged matrices float32)")  # fmt: skip
    p.add_argument("--allow-nonfinite", action="store_true",
                   help="copy NaN and infinite values instead of refusing them")  # fmt: skip


def _add_inspect(commands: Commands) -> None:
    i = commands.add_parser(
        "inspect",
        help="print what a model directory contains",
        description="Prints what a model directory contains: parameters, dtypes and bytes of each "
        "part, the configuration, and the files it was made from.",
    )
    i.add_argument("model", type=input_path, metavar="DIR", help="model directory")
    _add_base(i, "DIR")
    i.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return value


def main(argv: list[str] | None = None) -> None:
    """Run one command; argv is what follows `python -m convert`. UserError: a mistake in it."""
    args = _parser().parse_args(argv)
    if args.command == "build":
        from convert.build import build
        from convert.build_plan import BuildRequest

        fields = {k: v for k, v in vars(args).items() if k != "command"}
        build(BuildRequest(**fields))
    elif args.command == "export":
        _export(args)
    elif args.command == "merge":
        from convert.merge import merge

        merge(args.model, args.out, args.dtype, base=args.base)
    elif args.command == "unmerge":
        from convert.merge import unmerge

        unmerge(args.model, args.lora, args.out, args.dtype, base=args.base)
    elif args.command == "pack":
        from convert.pack import pack

        pack(
            args.model,
            args.out,
            base=args.base,
            merge=args.merge_lora,
            dtype=args.dtype,
            allow_nonfinite=args.allow_nonfinite,
        )
    else:
        from convert.inspect import inspect

        inspect(args.model, base=args.base, as_json=args.json)


def _export(args: argparse.Namespace) -> None:
    """Run `export`. UserError: a mistake in the arguments or the model."""
    if args.format == "pth":
        from convert.export import export

        export(
            args.model,
            args.out,
            base=args.base,
            overwrite=args.overwrite,
            allow_nonfinite=args.allow_nonfinite,
        )
        return
    from convert.hf_export import export_huggingface

    if args.overwrite:
        raise errors.UserError(
            "--overwrite is for files, and --format=huggingface writes a directory: choose another --out"
        )
    export_huggingface(args.model, args.out, base=args.base, allow_nonfinite=args.allow_nonfinite)


def run(argv: list[str] | None = None) -> NoReturn:
    """Run one command and end the process; a UserError becomes one line on stderr."""
    # SIGTERM raises SystemExit, so that incomplete output is removed. SIGPIPE ends the process
    # silently, for `| head`.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    errors.run(lambda: main(argv))
