"""python -m minigpt4_jax.batch --model=DIR --input=rows.jsonl --output=out.jsonl: answer many rows.

An input row is an object with "image" (a path relative to the file, a list of paths, or none) and
"prompt" (or "question"; without both, --prompt is used). Its output row is the same object with
"response", "finish_reason" and "tokens", or with "error" if it cannot be answered. Output row n belongs
to input row n. The same command continues an interrupted one.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
from tqdm import tqdm

from minigpt4_jax import errors
from minigpt4_jax.cli import common
from minigpt4_jax.cli.batch_output import OUTPUT_KEYS, BatchRow, Output
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import chat_templates
from minigpt4_jax.processing.images import load_pixels

if TYPE_CHECKING:
    from minigpt4_jax.inference.generation_config import GenerationConfig
    from minigpt4_jax.inference.model import Model
    from minigpt4_jax.inference.requests import Request

ROW_GROUP = 8  # rows whose images are read ahead and encoded together
READER_THREADS = 8

Encoded: TypeAlias = dict[str, np.ndarray | UserError]  # visual tokens [P, D] of each image path


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.make_parser(
        "batch", "Answer many questions, or caption many images, from a JSONL file."
    )
    p.add_argument("--input", required=True, type=Path, metavar="FILE", help="one row per line")
    p.add_argument("--output", required=True, type=Path, metavar="FILE", help="one answer per line")
    p.add_argument("--prompt", metavar="TEXT", help="for rows without a prompt")
    p.add_argument("--raw", action="store_true", help="prompts are complete, with <ImageHere> where "
                   "an image goes; by default they are put into the chat template")  # fmt: skip
    p.add_argument("--batch_size", type=int, default=32, help="rows decoded together (32)")
    common.add_generation_options(p, "greedy by default; row n is sampled with seed + n")
    return p.parse_args(argv)


# --- input ------------------------------------------------------------------------------------


def read_rows(path: Path, default_prompt: str | None) -> list[BatchRow]:
    """The rows of a file; broken ones have an error. UserError: unreadable file, or no rows."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise UserError(f"--input={path}: cannot be read ({e.strerror})") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"--input={path} has no rows; expected a JSON object per line")
    return [_parse_row(n, line, path.parent, default_prompt) for n, line in enumerate(lines)]


def _parse_row(number: int, line: bytes, folder: Path, default_prompt: str | None) -> BatchRow:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as e:
        return BatchRow(number, {}, error=f"the row is not JSON ({type(e).__name__}: {e})")
    if not isinstance(fields, dict):
        return BatchRow(number, {}, error=f"the row is {line[:40]!r}; expected an object")
    try:
        fields_with_prompt = _with_prompt(fields, default_prompt)
        return BatchRow(number, fields_with_prompt, _image_paths(fields, folder))
    except UserError as e:
        return BatchRow(number, fields, error=str(e))


def _with_prompt(fields: dict[str, Any], default_prompt: str | None) -> dict[str, Any]:
    if reserved := [name for name in OUTPUT_KEYS if name in fields]:
        raise UserError(f'the row has "{reserved[0]}", which the output needs; rename it')
    if "prompt" in fields or "question" in fields:
        return fields
    if default_prompt is None:
        raise UserError('the row has no "prompt"; add it, or pass --prompt')
    return fields | {"prompt": default_prompt}


def _image_paths(fields: dict[str, Any], folder: Path) -> tuple[str, ...]:
    value = fields.get("image", fields.get("images"))
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name or "\0" in name:
            raise UserError(f'"image" holds {name!r}; expected a path or a list of paths')
    return tuple(os.path.join(folder, name) for name in names)


def prepare(
    row: BatchRow,
    model: "Model",
    args: argparse.Namespace,
    template: chat_templates.ChatFormat,
    config: "GenerationConfig",
) -> None:
    """Set the row's request, still without visual tokens, or its error."""
    if row.error is not None:
        return
    try:
        prompt = row.fields.get("prompt", row.fields.get("question"))
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"the prompt is {prompt!r}; expected text")
        if not args.raw:
            question = chat_templates.with_images(prompt, len(row.images))
            prompt = template.render(
                [(question, None)], system=args.system, extra_bos=args.extra_bos
            )
        config = replace(config, seed=config.seed_of_prompts(1)[0] + row.number)
        (row.request,) = model.prepare_requests([list(row.images)], [prompt], config, [None])
    except UserError as e:
        row.error = str(e).removeprefix("prompt 0: ")


# --- images -----------------------------------------------------------------------------------


def with_visual(rows: Sequence[BatchRow], model: "Model") -> Iterator[BatchRow]:
    """Yield the rows in order, their requests with visual tokens.

    Threads read the images of the next group meanwhile. Visual tokens are kept for two groups,
    because questions about one image are usually next to each other.
    """
    groups = [rows[start : start + ROW_GROUP] for start in range(0, len(rows), ROW_GROUP)]
    read = partial(load_pixels, size=model.config.vision.image_size)
    encoded: Encoded = {}
    with ThreadPoolExecutor(READER_THREADS) as pool:
        reading: dict[str, Future[np.ndarray]] = {}
        for group, next_group in zip([[], *groups], [*groups, []], strict=True):
            pixels = reading
            needed = {image for row in next_group if row.request for image in row.images}
            reading = {
                image: pool.submit(read, image) for image in needed - encoded.keys() - pixels.keys()
            }
            reused = needed.union(*(row.images for row in group))
            encoded = {image: v for image, v in encoded.items() if image in reused}
            encoded |= _encode(model, pixels)
            yield from (_add_visual(row, encoded) for row in group)


def _encode(model: "Model", pixels: dict[str, Future[np.ndarray]]) -> Encoded:
    """Visual tokens [P, D] of each image, or its error."""
    failed: Encoded = {}
    readable: dict[str, np.ndarray] = {}
    for image, future in pixels.items():
        try:
            readable[image] = future.result()
        except UserError as e:
            failed[image] = e
    visual = model.encode_pixels(list(readable.values()))
    return failed | dict(zip(readable, visual, strict=True))


def _add_visual(row: BatchRow, encoded: Encoded) -> BatchRow:
    if row.request is None:
        return row
    visual: list[np.ndarray] = []
    for image in row.images:
        value = encoded[image]
        if isinstance(value, UserError):
            return replace(row, request=None, error=str(value))
        visual.append(value)
    joined = np.concatenate(visual) if visual else None
    return replace(row, request=replace(row.request, visual=joined))


# --- the command --------------------------------------------------------------------------------


def answer_all(model: "Model", rows: Sequence[BatchRow], output: Output, batch_size: int) -> int:
    """Answer the rows that are not written yet; returns how many of them have an error."""
    remaining, num_failed = rows[output.num_written :], 0
    taken: list[BatchRow] = []  # in the order of the requests
    interval = 0.5 if sys.stderr.isatty() else 30.0
    bar = tqdm(total=len(rows), initial=output.num_written, unit="row", mininterval=interval)

    def requests() -> Iterator["Request"]:
        nonlocal num_failed
        for row in with_visual(remaining, model):
            if row.request is None:
                num_failed += 1
                bar.update(output.put(row, {"error": row.error}))
            else:
                taken.append(row)
                yield row.request

    sized_for = [row.request for row in remaining if row.request]
    with bar:
        for i, answer in model.run_requests(requests(), batch_size, sized_for=sized_for):
            result = {"response": answer.text, "finish_reason": answer.finish_reason}
            bar.update(output.put(taken[i], result | {"tokens": len(answer.ids)}))
    return num_failed


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size}: expected 1 or more")
    if args.input.resolve() == args.output.resolve():
        raise UserError("--input and --output are the same file; choose another --output")
    from minigpt4_jax.inference.generation_config import GenerationConfig

    config = GenerationConfig(**common.given_options(args), extra_bos=args.extra_bos)
    rows = read_rows(args.input, args.prompt)
    recorded = {k: v for k, v in vars(args).items() if k not in ("input", "output", "batch_size")}
    output = Output(args.output, rows, recorded)
    if output.num_written == len(rows):
        print(f"all {len(rows)} rows are answered already: {args.output}")
        return 0
    model = common.load_model(args)
    remaining = rows[output.num_written :]
    template = chat_templates.chat_format(model.config, model.tokenizer, args.template)
    # The model's own template ends an answer with its end symbol.
    stop = template.stop if args.template else ()
    for row in remaining:
        prepare(row, model, args, template, replace(config, stop=stop))
    with output:
        num_failed = answer_all(model, rows, output, args.batch_size)
    print(f"{len(remaining)} rows, {num_failed} of them with an error: {args.output}")
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
