"""python -m minigpt4_jax.batch --model=DIR --input=rows.jsonl --output=out.jsonl: answer many rows.

An input row is an object with "image" (a path relative to the file, a list of paths, or none) and
"prompt" (or "question"; without both, --prompt is used). Its output row is the same object with
"response", "finish_reason" and "tokens", or with "error" if it cannot be answered. Output row n belongs
to input row n. The same command continues an interrupted one; with --retry-errors it also answers the
rows again that have an error. Exit code 1: rows of the output have an error.
"""

import argparse
import codecs
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tqdm import tqdm

from minigpt4_jax import errors
from minigpt4_jax.cli import common
from minigpt4_jax.cli.batch_output import OUTPUT_KEYS, BatchRow, Output
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import chat_templates

if TYPE_CHECKING:
    from minigpt4_jax.inference.generation_config import GenerationConfig, GenerationOutput
    from minigpt4_jax.inference.model import Model

# options that answers do not depend on
NOT_RECORDED = ("input", "output", "batch_size", "retry_errors", "base", "allow_nonfinite")


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
    p.add_argument("--retry-errors", action="store_true",
                   help="answer the rows of an existing output again that have an error")  # fmt: skip
    common.add_generation_options(p, "greedy by default; row n is sampled with seed + n")
    return p.parse_args(argv)


# --- input ------------------------------------------------------------------------------------


def read_rows(path: Path, default_prompt: str | None) -> list[BatchRow]:
    """The rows of a file; broken ones have an error. UserError: unreadable file, no rows, no JSONL."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise UserError(f"--input={path}: cannot be read ({e.strerror})") from None
    _check_encoding(path, data)
    lines = [line for line in data.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--input={path} has no rows; expected a JSON object per line")
    _check_one_object_per_line(path, data, lines)
    return [_parse_row(n, line, path.parent, default_prompt) for n, line in enumerate(lines)]


def _check_encoding(path: Path, data: bytes) -> None:
    """UserError: UTF-16 or UTF-32, with or without a byte order mark."""
    encoding = json.detect_encoding(data[:4])
    if encoding.startswith("utf-8") or not (
        data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE))
        or data.count(0) >= len(data) // 4  # every second or fourth byte of ASCII characters
    ):
        return
    name = encoding.upper().removesuffix("-LE").removesuffix("-BE")
    raise UserError(
        f"--input={path} is {name}; expected UTF-8: save it as UTF-8, for instance with "
        f"`iconv -f {name} -t UTF-8 {path} > rows.jsonl`"
    )


def _check_one_object_per_line(path: Path, data: bytes, lines: Sequence[bytes]) -> None:
    """UserError: the file is one JSON document, an array or an object over several lines."""
    if not lines[0].lstrip(codecs.BOM_UTF8).strip().startswith((b"[", b"{")):
        return
    if len(lines) > 1 and isinstance(_json_or_none(lines[0]), dict):
        return
    document = _json_or_none(data)
    if isinstance(document, list):
        raise UserError(
            f"--input={path} is one JSON array of {len(document)} rows; expected a JSON object per "
            f"line: convert it, for instance with `jq -c '.[]' {path} > rows.jsonl`"
        )
    if isinstance(document, dict) and len(lines) > 1:
        raise UserError(
            f"--input={path} is one JSON object over {len(lines)} lines; expected a JSON object per "
            f"line: convert it, for instance with `jq -c . {path} > rows.jsonl`"
        )


def _json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


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
    """Set the row's prompt, or its error."""
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
        (prepared,) = model.prepare_prompts([list(row.images)], [prompt], config)
        if isinstance(prepared, UserError):
            raise prepared
        row.prompt = prepared
    except UserError as e:
        row.error = str(e)


# --- the command --------------------------------------------------------------------------------


def answer_all(model: "Model", num_rows: int, output: Output, batch_size: int) -> None:
    """Answer the remaining rows of an output. num_rows: of the whole file."""
    remaining = output.remaining
    interval = 0.5 if sys.stderr.isatty() else 30.0
    initial = num_rows - len(remaining)
    with tqdm(total=num_rows, initial=initial, unit="row", mininterval=interval) as bar:
        for row in remaining:
            if row.prompt is None:
                output.put(row, {"error": row.error})
                bar.update()
        rows = [row for row in remaining if row.prompt is not None]
        prompts = [row.prompt for row in rows if row.prompt is not None]
        # A search sorts its prompts by length: in groups, so that answers are written soon.
        searched = any(prompt.request.beam_search.num_beams > 1 for prompt in prompts)
        group = batch_size if searched else max(1, len(prompts))
        for start in range(0, len(prompts), group):
            some = prompts[start : start + group]
            for i, answers in model.answer_prompts(some, batch_size, on_error="return"):
                output.put(rows[start + i], _result(answers))
                bar.update()


def _result(outputs: Sequence["GenerationOutput"]) -> dict[str, Any]:
    """What is written of the answers to a row: lists where several were asked for."""
    if outputs[0].error is not None:
        return {"error": outputs[0].error}
    columns: dict[str, list[Any]] = {
        "response": [output.text for output in outputs],
        "finish_reason": [output.finish_reason for output in outputs],
        "tokens": [len(output.ids) for output in outputs],
    }
    return {name: v[0] if len(outputs) == 1 else v for name, v in columns.items()}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size}: expected 1 or more")
    if args.input.resolve() == args.output.resolve():
        raise UserError("--input and --output are the same file; choose another --output")
    from minigpt4_jax.inference.generation_config import GenerationConfig

    config = GenerationConfig(**common.given_options(args), extra_bos=args.extra_bos)
    rows = read_rows(args.input, args.prompt)
    settings = {k: v for k, v in vars(args).items() if k not in NOT_RECORDED}
    output = Output(args.output, rows, settings, retry_errors=args.retry_errors)
    if not output.remaining:
        return _finish(f"all {len(rows)} rows are answered already", output, args)
    model = common.load_model(args)
    template = chat_templates.chat_format(model.config, model.tokenizer, args.template)
    # The model's own template ends an answer with its end symbol.
    stop = template.stop if args.template else ()
    for row in output.remaining:
        prepare(row, model, args, template, replace(config, stop=(*stop, *config.stop)))
    with output:
        answer_all(model, len(rows), output, args.batch_size)
    return _finish(f"{len(output.remaining)} rows", output, args)


def _finish(summary: str, output: Output, args: argparse.Namespace) -> int:
    """Print what was done; exit code 1 if rows of the output have an error."""
    hint = "; mend the cause and pass --retry-errors to answer these again"
    num_errors = output.num_errors
    print(
        f"{summary}, {num_errors} of them with an error: {args.output}{hint if num_errors else ''}"
    )
    return 1 if num_errors else 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
