"""A conversation in a terminal: answers to questions, and the commands that start with `/`."""

import argparse
import contextlib
import json
import os
import shlex
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4_jax.cli import common
from minigpt4_jax.cli.common import note
from minigpt4_jax.errors import UserError
from minigpt4_jax.storage.atomic import write_error, write_text_atomically

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model

# The original's chat (demo.py, demo_v2.py and Chat.answer_prepare in conversation.py)
DEFAULTS: dict[str, float | int] = {
    "temperature": 1.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.05, "max_new_tokens": 300,
}  # fmt: skip
EXCLUDED = ("num_return_sequences",)  # options of `generate` that a conversation does not have
DEFAULTS_V2 = DEFAULTS | {"temperature": 0.6, "max_new_tokens": 500}

HELP = """\
/image FILE ...      add images to the next question (quote a name with spaces)
/retry               answer the last question again
/undo                remove the last question and its answer
/reset               start again, without history and images
/set NAME=VALUE ...  change options, for instance temperature=0.2; without arguments: show them
/save FILE           write the conversation as JSON, which --load reads
/boxes FILE          draw the boxes of the last answer into the last image, for instance boxes.png
/help                show this
/quit                or Ctrl-D; Ctrl-C stops an answer, twice within a second also ends a pipe
//text               a question that starts with /text"""


def generation_options(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """The original chat's options for this variant, with those of the command line. UserError: wrong."""
    return options_with_defaults(variant, common.given_options(args))[0]


def options_with_defaults(variant: str, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The options of an answer, and notes about given ones without effect. UserError: wrong."""
    from minigpt4_jax.inference.generation_config import GenerationConfig

    defaults = DEFAULTS_V2 if variant == "minigpt-v2" else DEFAULTS
    if given.get("num_beams", 1) > 1:  # beam search does not sample
        defaults = {k: v for k, v in defaults.items() if k not in common.SAMPLING_OPTIONS}
    options = common.default_options() | defaults | given
    notes = common.unused_options(given, GenerationConfig(**options))
    if options["context"] is None:  # the conversation's own default
        del options["context"]
    return options, notes


class Session:
    """A conversation and the options and images of its next question.

    Answers go to stdout, everything else to stderr.
    """

    def __init__(
        self,
        model: "Model",
        args: argparse.Namespace,
        *,
        before_answer: Callable[[], object] = lambda: None,
    ):
        """before_answer: called before each answer; waits for what is compiled in the background."""
        self._before_answer = before_answer
        self.conversation = model.conversation(args.system, args.template)
        if args.load is not None:
            self._load(args)
        self._given = common.given_options(args)  # and those of /set
        self.options, _ = options_with_defaults(model.config.variant, self._given)
        self.extra_bos = args.extra_bos
        self.images: list[str] = list(args.image)  # of the next question
        self._written: set[Path] = set()  # files that may be overwritten

    def _load(self, args: argparse.Namespace) -> None:
        from minigpt4_jax.inference.conversation import Turn
        from minigpt4_jax.inference.transcript import read_transcript

        transcript = read_transcript(args.load)
        self.conversation.turns += [Turn(*turn) for turn in transcript.turns]
        if args.system is None:
            self.conversation.system = transcript.system
        note(f"loaded {len(transcript.turns)} questions and answers")

    def handle(self, line: str) -> bool:
        """Process a line; False when it ends the session. UserError: the session is unchanged.

        Pasted lines are one question, behind the commands that stand before it, one on each line."""
        command, newline, rest = line.partition("\n")
        if newline and command.startswith("/") and not command.startswith("//"):
            return self.handle(command.rstrip()) and (not rest.strip() or self.handle(rest.strip()))
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line.removeprefix("/"))
            return True
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        if name not in COMMANDS:
            known = ", ".join(f"/{c}" for c in [*COMMANDS, "quit"])
            raise UserError(
                f"/{name} is not a command; known are {known}; a question that starts with / is //{name}"
            )
        COMMANDS[name](self, rest.strip())
        return True

    def answer(self, question: str) -> str:
        """The answer to the next question, without printing it."""
        self._before_answer()
        with _warnings_as_notes():
            return self.conversation.ask(
                question, self.images, extra_bos=self.extra_bos, **self.options
            )

    def _ask(self, question: str) -> None:
        if self.options["num_beams"] > 1:  # a search decides on the first token at the end
            print(self.answer(question), flush=True)
            self.images = []
            return
        self._before_answer()
        with _warnings_as_notes():
            pieces = self.conversation.stream(
                question, self.images, extra_bos=self.extra_bos, **self.options
            )
        num_turns = len(self.conversation.turns)
        try:
            self._print_pieces(pieces)
        finally:
            if len(self.conversation.turns) > num_turns:  # not stopped before its first token
                self.images = []

    def _print_pieces(self, pieces: Generator[str]) -> None:
        printed = ""
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
                printed += piece
        finally:
            pieces.close()  # the conversation keeps what was printed
            print(flush=True)
        answer = self.conversation.turns[-1].answer
        if answer != printed:  # see TextStream
            note(f"note: only what follows the role name is the answer: {answer}")

    # --- commands ---------------------------------------------------------------------------

    def image(self, text: str) -> None:
        from minigpt4_jax.processing.images import open_image

        # a name with spaces need not be quoted
        names = [text] if os.path.exists(os.path.expanduser(text)) else _split_words(text)
        paths = [os.path.expanduser(name) for name in names]
        if not paths:
            raise UserError("/image needs a file, for instance /image photo.jpg")
        for path in paths:
            open_image(path)
        self.images += paths
        note(f"{len(self.images)} image{'s'[: len(self.images) > 1]} with the next question")

    def retry(self, _: str) -> None:
        # without the seed, so that the next one is used
        options = {name: value for name, value in self.options.items() if name != "seed"}
        with _warnings_as_notes():
            if options["num_beams"] > 1:
                print(self.conversation.retry(**options), flush=True)
                return
            pieces = self.conversation.stream_retry(**options)
        self._print_pieces(pieces)

    def undo(self, _: str) -> None:
        turn = self.conversation.undo()
        self.images = [str(image) for image in turn.images] + self.images
        note(f"removed: {turn.question}")

    def reset(self, _: str) -> None:
        self.conversation.reset()
        self.images = []
        note("started a new conversation; /image adds an image")

    def set(self, text: str) -> None:
        changes = common.parse_options(_split_words(text), EXCLUDED)
        for name in changes.keys() & set(EXCLUDED):
            raise UserError(
                f"{name} is not an option of a conversation, which goes on with one answer"
            )
        given = self._given | changes
        self.options, notes = options_with_defaults(self.conversation.model.config.variant, given)
        self._given = given
        for line in notes:
            note(f"note: {line}")
        shown = {name: value for name, value in self.options.items() if name not in EXCLUDED}
        note("  ".join(f"{name}={value}" for name, value in shown.items()))

    def save(self, text: str) -> None:
        path = self._output_file(text, "/save needs one file, for instance /save talk.json")
        document = json.dumps(self.conversation.transcript(), indent=1, ensure_ascii=False) + "\n"
        try:  # image paths may hold bytes that are not UTF-8
            write_text_atomically(path, document, errors="backslashreplace")
        except OSError as e:
            raise write_error(path, e) from None
        self._written.add(path.resolve())
        note(f"wrote {path}")

    def boxes(self, text: str) -> None:
        path = self._output_file(text, "/boxes needs one file, for instance /boxes boxes.png")
        self.save_image(path)
        self._written.add(path.resolve())

    def help(self, _: str) -> None:
        note(HELP)

    def _output_file(self, text: str, usage: str) -> Path:
        """The file that a command names. UserError: none, several, or an existing file of others."""
        quoted = text[:1] in ("'", '"') or "\\" in text
        names = _split_words(text) if quoted else [text]  # a name with spaces need not be quoted
        if len(names) != 1 or not names[0]:
            raise UserError(usage)
        path = Path(names[0]).expanduser()
        if path.exists() and path.resolve() not in self._written:
            raise UserError(f"{path} exists already; choose another name")
        return path

    def save_image(self, path: Path) -> None:
        """Draw the boxes of the last answer into the most recent image."""
        from minigpt4_jax.processing.images import open_image
        from minigpt4_jax.visualization.boxes import draw_boxes, save

        turns = self.conversation.turns
        images = [image for turn in turns for image in turn.images]
        if not images:
            raise UserError("no question about an image has been answered yet; ask one first")
        picture = open_image(images[-1], exif=self.conversation.model.exif)
        save(draw_boxes(picture, turns[-1].answer), path)
        note(f"wrote {path}")


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "image": Session.image, "retry": Session.retry, "undo": Session.undo, "reset": Session.reset,
    "set": Session.set, "save": Session.save, "boxes": Session.boxes, "help": Session.help,
}  # fmt: skip


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print warnings, such as that the conversation was cut, as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        note(f"note: {warning.message}")


def _split_words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(
            f"{text}: {e}; quote a name with spaces, as in '/image \"my cat.jpg\"'"
        ) from e
