"""python -m minigpt4_jax.batch --model=DIR --input=rows.jsonl --output=out.jsonl: answer many rows.

A row of the input is an object with "image" (a path beside the file, a list of paths, or none) and
"prompt" (or "question"; without both, --prompt serves). A row of the output is the same object with
"response", "finish_reason" and "tokens", or with "error" where it cannot be answered; row n of the output
belongs to row n of the input. The same command goes on where an interrupted one stopped.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from tqdm import tqdm

from minigpt4_jax import errors
from minigpt4_jax.cli import common
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import chat_templates as texts
from minigpt4_jax.processing.images import load_pixels
from minigpt4_jax.storage.atomic import write_text_atomically

if TYPE_CHECKING:
    from minigpt4_jax.inference.generation_config import GenerationConfig
    from minigpt4_jax.inference.model import Model
    from minigpt4_jax.inference.requests import Request

MADE = ("response", "finish_reason", "tokens", "error")  # keys of the output alone
TOGETHER = 8  # images encoded together
READERS = 8  # threads that open images


@dataclass
class BatchRow:
    """A line of the input, and the request made of it, or why there is none."""

    number: int  # from 0
    fields: dict[str, Any]
    images: tuple[str, ...] = ()
    request: "Request | None" = None  # its visual tokens are yet to come
    error: str | None = None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.parser("batch", "Answer many questions, or caption many images, from a JSONL file.")
    p.add_argument("--input", required=True, type=Path, metavar="FILE", help="rows, one a line")
    p.add_argument("--output", required=True, type=Path, metavar="FILE", help="answers, one a line")
    p.add_argument("--prompt", metavar="TEXT", help="for rows that have none")
    p.add_argument("--raw", action="store_true", help="prompts are whole strings with <ImageHere> "
                   "where an image goes; else the chat template is put around them")  # fmt: skip
    p.add_argument("--batch_size", type=int, default=32, help="rows decoded together (32)")
    common.add_choices(p, "greedy by default; row n is drawn with seed + n")
    return p.parse_args(argv)


# --- input ------------------------------------------------------------------------------------


def read_rows(path: Path, prompt: str | None) -> list[BatchRow]:
    """The rows of a file, those that are broken with their error. UserError: no such file, no rows."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise UserError(f"--input={path}: cannot be read ({e.strerror})") from None
    lines = [line for line in lines if line.strip()]
    if not lines:
        raise UserError(f"--input={path} has no rows; expected a JSON object a line")
    return [_row(n, line, path.parent, prompt) for n, line in enumerate(lines)]


def _row(number: int, line: bytes, folder: Path, prompt: str | None) -> BatchRow:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as e:
        return BatchRow(number, {}, error=f"the row is not JSON ({type(e).__name__}: {e})")
    if not isinstance(fields, dict):
        return BatchRow(number, {}, error=f"the row is {line[:40]!r}; expected an object")
    try:
        return BatchRow(number, _with_prompt(fields, prompt), _images(fields, folder))
    except UserError as e:
        return BatchRow(number, fields, error=str(e))


def _with_prompt(fields: dict[str, Any], prompt: str | None) -> dict[str, Any]:
    if taken := [name for name in MADE if name in fields]:
        raise UserError(f'the row has "{taken[0]}", which the output needs; rename it')
    if "prompt" in fields or "question" in fields:
        return fields
    if prompt is None:
        raise UserError('the row has no "prompt"; add it, or give --prompt')
    return fields | {"prompt": prompt}


def _images(fields: dict[str, Any], folder: Path) -> tuple[str, ...]:
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
    template: texts.ChatTemplate,
    generation_config: "GenerationConfig",
) -> None:
    """Make the row's request of its prompt, or note its error."""
    if row.error is not None:
        return
    try:
        prompt = row.fields.get("prompt", row.fields.get("question"))
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"the prompt is {prompt!r}; expected text")
        if not args.raw:
            question = texts.with_images(prompt, len(row.images))
            prompt = texts.render_chat(
                template, [(question, None)], system=args.system, extra_bos=args.extra_bos
            )
        generation_config = replace(generation_config, seed=generation_config.seed + row.number)  # type: ignore[operator]
        (row.request,) = model._requests([list(row.images)], [prompt], generation_config, [None])
    except UserError as e:
        row.error = str(e).removeprefix("prompt 0: ")


# --- images -----------------------------------------------------------------------------------


def with_visual(rows: Sequence[BatchRow], model: "Model") -> Iterator[BatchRow]:
    """The rows in order, their requests with visual tokens. The next images are opened on threads
    meanwhile; those of the last few rows are kept, since questions about one image stand together."""
    groups = [rows[k : k + TOGETHER] for k in range(0, len(rows), TOGETHER)]
    read = partial(load_pixels, size=model.config.vision.image_size)
    known: dict[str, np.ndarray | UserError] = {}
    with ThreadPoolExecutor(READERS) as pool:
        coming: dict[str, Future] = {}  # images that are being opened
        for group, following in zip([[], *groups], [*groups, []], strict=True):
            pixels, needed = coming, [i for row in following if row.request for i in row.images]
            coming = {i: pool.submit(read, i) for i in {*needed} - known.keys() - pixels.keys()}
            kept = {*needed}.union(*(row.images for row in group))
            known = {i: v for i, v in known.items() if i in kept} | _encode(model, pixels)
            yield from (_completed(row, known) for row in group)


def _encode(model: "Model", pixels: dict[str, Future]) -> dict[str, np.ndarray | UserError]:
    """Visual tokens [P, D] of each image, or what is wrong with it."""
    found: dict[str, np.ndarray | UserError] = {}
    good: dict[str, np.ndarray] = {}
    for image, future in pixels.items():
        try:
            good[image] = future.result()
        except UserError as e:
            found[image] = e
    names = list(good)
    for some in (names[k : k + TOGETHER] for k in range(0, len(names), TOGETHER)):
        encoded = model._encode_pixels([good[name] for name in some])
        found.update(zip(some, encoded, strict=True))
    return found


def _completed(row: BatchRow, known: dict[str, Any]) -> BatchRow:
    if row.request is None:
        return row
    visual = [known[image] for image in row.images]
    if wrong := [v for v in visual if isinstance(v, UserError)]:
        return replace(row, request=None, error=str(wrong[0]))
    joined = np.concatenate(visual) if visual else None
    return replace(row, request=replace(row.request, visual=joined))


# --- output -----------------------------------------------------------------------------------


class Output:
    """The file of answers: lines in the order of the rows, each written whole.

    done: rows that are written. Beside it lies FILE.settings.json: what the answers were made with.
    """

    def __init__(self, path: Path, rows: Sequence[BatchRow], settings: dict[str, Any]):
        """Look at what is there. UserError: it belongs to other rows or settings, or is no file."""
        self._path, self._settings = path, settings
        self._settings_file = path.with_name(path.name + ".settings.json")
        self._waiting: dict[int, dict[str, Any]] = {}  # answers whose turn has not come
        if not path.parent.is_dir():
            raise UserError(f"--output={path}: there is no directory {path.parent}")
        try:
            lines = self._lines() if path.exists() and path.stat().st_size else []
        except (OSError, ValueError) as e:
            raise UserError(f"--output={path}: cannot be read ({e})") from None
        for n, line in enumerate(lines):
            if n >= len(rows) or not _belongs(line, rows[n]):
                raise self._refused(f"line {n + 1} is not the answer to row {n + 1} of the input")
        self.done = len(lines)
        self._bytes = sum(len(line) + 1 for line in lines)

    def _lines(self) -> list[bytes]:
        """The whole lines; an interruption may have cut the last one."""
        if not self._settings_file.exists():
            raise self._refused("is there already, and was not begun by this command")
        before = json.loads(self._settings_file.read_bytes())
        for name, value in self._settings.items():
            if before.get(name) != value:
                raise self._refused(f"was begun with {name} {before.get(name)}, now {value}")
        data = self._path.read_bytes()
        return data[: data.rfind(b"\n") + 1].splitlines()

    def _refused(self, reason: str) -> UserError:
        return UserError(f"--output={self._path}: {reason}; name another --output, or remove it")

    def __enter__(self) -> "Output":
        """Begin to write. UserError: that cannot be."""
        try:  # the settings first, and whole: without them answers could not be gone on with
            write_text_atomically(self._settings_file, json.dumps(self._settings, indent=1) + "\n")
            self._file = self._path.open("ab")
            self._file.truncate(self._bytes)
        except OSError as e:
            raise UserError(f"--output={self._path}: cannot be written ({e.strerror})") from None
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def put(self, row: BatchRow, made: dict[str, Any]) -> int:
        """Write the answer to a row as soon as those before it are written; how many were."""
        self._waiting[row.number] = row.fields | made
        before = self.done
        while self.done in self._waiting:
            try:
                self._file.write(_line(self._waiting.pop(self.done)))
                self._file.flush()
            except OSError as e:
                raise UserError(
                    f"cannot write {self._path}: {e.strerror}; {self.done} rows are written, the "
                    "same command goes on from there"
                ) from None
            self.done += 1
        return self.done - before


def _line(fields: dict[str, Any]) -> bytes:
    try:
        return (json.dumps(fields, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a character, which JSON can say and UTF-8 cannot
        return (json.dumps(fields) + "\n").encode()


def _belongs(line: bytes, row: BatchRow) -> bool:
    try:
        found = json.loads(line)
        made = {name: value for name, value in found.items() if name in MADE}
    except (ValueError, AttributeError):
        return False
    # as text: a NaN is not equal to itself
    return bool(made) and json.dumps(row.fields | made) == json.dumps(found)


# --- the command --------------------------------------------------------------------------------


def answer_all(
    model: "Model",
    rows: Sequence[BatchRow],
    output: Output,
    batch_size: int,
    stop: Sequence[str] = (),
) -> int:
    """Answer the rows that are not answered yet; returns how many of them could not be."""
    todo, failed = rows[output.done :], 0
    taken: list[BatchRow] = []  # in the order the engine took them
    pause = 0.5 if sys.stderr.isatty() else 30.0
    bar = tqdm(total=len(rows), initial=output.done, unit="row", mininterval=pause)

    def requests() -> Iterator["Request"]:
        nonlocal failed
        for row in with_visual(todo, model):
            if row.request is None:
                failed += 1
                bar.update(output.put(row, {"error": row.error}))
            else:
                taken.append(row)
                yield row.request

    like = [row.request for row in todo if row.request]
    with bar:
        for i, answer, _ in model._engine.run(requests(), batch_size, like=like):
            found = model._generation(answer, stop)
            made = {"response": found.text, "finish_reason": found.finish_reason}
            bar.update(output.put(taken[i], made | {"tokens": len(found.ids)}))
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch_size={args.batch_size}: expected 1 or more")
    if args.input.resolve() == args.output.resolve():
        raise UserError("--input and --output are the same file; name another --output")
    from minigpt4_jax.inference.generation_config import GenerationConfig

    generation_config = GenerationConfig.of(
        common.default_choices() | common.chosen(args) | {"extra_bos": args.extra_bos}
    )
    rows = read_rows(args.input, args.prompt)
    kept = {k: v for k, v in vars(args).items() if k not in ("input", "output", "batch_size")}
    output = Output(args.output, rows, kept)
    if output.done == len(rows):
        print(f"all {len(rows)} rows are answered already: {args.output}")
        return 0
    model = common.load(args)
    todo = rows[output.done :]
    template = texts.find_template(model.config, args.template)
    stop = texts.answer_endings(template) if args.template else ()
    for row in todo:
        prepare(row, model, args, template, replace(generation_config, stop=stop))
    with output:
        failed = answer_all(model, rows, output, args.batch_size, stop)
    print(f"{len(todo)} rows, {failed} of them with an error: {args.output}")
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
