"""minigpt4 curate describe --model=DIR --images=FOLDER --output=FILE.jsonl: describe images with a model.

An output row has "id", the image, "sample", and "caption", the answers of one or two turns ("turns") joined
by a space; or "error". The same command continues an interrupted one.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from minigpt4_jax.checkpoint.model_directory import fingerprint
from minigpt4_jax.cli import common
from minigpt4_jax.cli.batch_output import BatchRow, Output
from minigpt4_jax.curation.describe import (
    CONTINUE_BELOW,
    CONTINUE_PROMPT,
    PROMPT,
    Describer,
    DescribeTask,
    Description,
    Instructions,
    RawPrompts,
)
from minigpt4_jax.curation.images import ImageRow, list_images
from minigpt4_jax.curation.rows import image_fields
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import chat_templates

RESULT_KEYS = ("caption", "turns", "tokens", "finish_reason", "error")
ROW_KEYS = ("image", "shard", "offset", "size", "id", "sample", "references", *RESULT_KEYS)
# as the original's Chat.answer
DEFAULTS = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 300}
BEAM_OPTIONS = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")
# options that descriptions do not depend on
NOT_RECORDED = ("output", "batch_size", "retry_errors", "base", "allow_nonfinite", *BEAM_OPTIONS)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.make_parser(
        "curate describe", "Describe images with a model, in two turns as MiniGPT-4's authors did."
    )
    p.add_argument("--images", required=True, metavar="PATH", help="a folder, webdataset shards "
                   "(.tar), or a .jsonl file of rows with \"image\"")  # fmt: skip
    p.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="a row per description"
    )
    p.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="the first question")
    p.add_argument("--continue-prompt", default=CONTINUE_PROMPT, metavar="TEXT",
                   help=f"asked after a short answer ({CONTINUE_PROMPT})")  # fmt: skip
    p.add_argument("--continue-below", type=int, default=CONTINUE_BELOW, metavar="TOKENS",
                   help=f"an answer with fewer tokens is short ({CONTINUE_BELOW}); 0: one turn")  # fmt: skip
    p.add_argument("--raw", action="store_true", help="--prompt is complete, with <ImageHere> where the "
                   "image goes, and there is one turn")  # fmt: skip
    p.add_argument("--samples", type=int, default=1, help="descriptions of each image (1)")
    p.add_argument("--num-images", type=int, metavar="N",
                   help="describe so many images, drawn with --seed (all)")  # fmt: skip
    p.add_argument("--batch_size", type=int, default=32, help="rows decoded together (32)")
    p.add_argument("--retry-errors", action="store_true",
                   help="describe the rows of an existing output again that have an error")  # fmt: skip
    defaults = ", ".join(f"{name} {value}" for name, value in DEFAULTS.items())
    common.add_generation_options(
        p, f"{defaults} by default; row n is sampled with seed + n", excluded=BEAM_OPTIONS
    )
    return p.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
    for name, least in (
        ("samples", 1),
        ("batch_size", 1),
        ("continue_below", 0),
        ("num_images", 1),
    ):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = name if name == "batch_size" else name.replace("_", "-")
            raise UserError(f"--{flag}={value}: expected {least} or more")
    if args.samples > 1 and args.temperature is not None and args.temperature == 0:
        raise UserError(
            f"--samples={args.samples} with --temperature=0 would be {args.samples} equal "
            "descriptions; raise the temperature"
        )
    if args.raw and chat_templates.IMAGE_TAG not in args.prompt:
        raise UserError(f"--raw: --prompt={args.prompt!r} has no {chat_templates.IMAGE_TAG}")
    if args.raw and (args.system is not None or args.template is not None):
        raise UserError("--raw: --system and --template are parts of a template; leave them out")
    for name in ("prompt", "continue_prompt"):
        if not getattr(args, name).strip():
            raise UserError(f"--{name.replace('_', '-')} is empty; expected a question")


def make_rows(
    images: Sequence[ImageRow], samples: int, folder: Path
) -> tuple[list[BatchRow], list[DescribeTask]]:
    """The rows of the output without their descriptions, and what is to be described for each.

    folder: of the output, which image paths are relative to. UserError: a field that the output needs.
    """
    rows: list[BatchRow] = []
    tasks: list[DescribeTask] = []
    for image in images:
        if reserved := [name for name in image.fields if name in ROW_KEYS]:
            raise UserError(
                f'image "{image.id}": its row has "{reserved[0]}", which the output needs; rename it'
            )
        fields: dict[str, Any] = {"id": image.id, **image_fields(image.source, folder)}
        if image.references:
            fields["references"] = list(image.references)
        for sample in range(samples):
            number = len(rows)
            rows.append(BatchRow(number, {**fields, **image.fields, "sample": sample}))
            tasks.append(DescribeTask(number, image.source))
    return rows, tasks


def describe_all(
    describer: Describer,
    tasks: Sequence[DescribeTask],
    num_rows: int,
    output: Output,
    batch_size: int,
) -> None:
    """Describe the remaining rows of an output. num_rows: of the whole file."""
    remaining = [tasks[row.number] for row in output.remaining]
    rows = {row.number: row for row in output.remaining}
    interval = 0.5 if sys.stderr.isatty() else 30.0
    initial = num_rows - len(remaining)
    bar = tqdm(total=num_rows, initial=initial, unit="row", mininterval=interval)
    with bar:
        for task, description in describer.run(remaining, batch_size):
            output.put(rows[task.number], _result(description))
            bar.update()


def _result(description: Description) -> dict[str, Any]:
    """What is written of a description."""
    if description.error is not None:
        return {"error": description.error}
    outputs = description.outputs
    return {
        "caption": description.text,
        "turns": [output.text for output in outputs],
        "tokens": [len(output.ids) for output in outputs],
        "finish_reason": [output.finish_reason for output in outputs],
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    _check(args)
    common.check_kind(args.model, keeps_images=True)
    from minigpt4_jax.inference.generation_config import GenerationConfig

    options = DEFAULTS | common.given_options(args)
    config = GenerationConfig(**options, extra_bos=args.extra_bos)
    images = list_images(args.images)
    if args.num_images is not None:
        if args.num_images > len(images):
            raise UserError(f"--num-images={args.num_images}: there are only {len(images)} images")
        chosen = random.Random(config.seed_of_prompts(1)[0]).sample(
            range(len(images)), args.num_images
        )
        images = [images[i] for i in sorted(chosen)]
    rows, tasks = make_rows(images, args.samples, args.output.parent)
    recorded = {k: v for k, v in vars(args).items() if k not in NOT_RECORDED}
    settings = {
        "command": "describe", **recorded, **_defaults(), **options,
        "model_fingerprint": fingerprint(args.model, args.base),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))  # as it is read back
    output = Output(
        args.output, rows, settings, retry_errors=args.retry_errors, result_keys=RESULT_KEYS
    )
    if not output.remaining:
        return _finish(f"all {len(rows)} rows are described already", output, args)
    model = common.load_model(args)
    template = (
        RawPrompts()
        if args.raw
        else chat_templates.chat_format(model.config, model.tokenizer, args.template)
    )
    # The model's own template ends an answer with its end symbol.
    stop = template.stop if args.template else ()
    config = GenerationConfig.merge(config, {"stop": (*stop, *config.stop)})
    instructions = Instructions(
        args.prompt, args.continue_prompt, 0 if args.raw else args.continue_below, args.system
    )
    describer = Describer(model, template, instructions, config)
    with output:
        describe_all(describer, tasks, len(rows), output, args.batch_size)
    return _finish(f"{len(output.remaining)} rows", output, args)


def _defaults() -> dict[str, Any]:
    """The generation options that are used unless others are given."""
    return {k: v for k, v in common.default_options().items() if k not in BEAM_OPTIONS}


def _finish(summary: str, output: Output, args: argparse.Namespace) -> int:
    """Print what was done; exit code 1 if rows of the output have an error."""
    hint = "; mend the cause and pass --retry-errors to describe these again"
    num_errors = output.num_errors
    print(
        f"{summary}, {num_errors} of them with an error: {args.output}{hint if num_errors else ''}"
    )
    return 1 if num_errors else 0
