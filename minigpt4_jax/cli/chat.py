"""python -m minigpt4_jax.chat --model=DIR [--image=F ...]: talk with a model about images in a terminal.

With --prompt it prints one answer. Without, questions are read from the terminal, or one a line from
a pipe, and make one conversation; a line that begins with `/` is a command.
"""

import argparse
import contextlib
import io
import json
import math
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minigpt4_jax import errors
from minigpt4_jax.cli import common
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.tasks import BARE_TASKS, TASKS
from minigpt4_jax.storage.atomic import write_error, write_text_atomically

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model

# The original's chat (demo.py, demo_v2.py and Chat.answer_prepare in conversation.py)
DEFAULTS: dict[str, float | int] = {
    "temperature": 1.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.05, "max_new_tokens": 300,
}  # fmt: skip
DEFAULTS_V2 = DEFAULTS | {"temperature": 0.6, "max_new_tokens": 500}

HELP = """\
/image FILE ...      images that come with the next question (quote a name with spaces)
/retry               answer the last question again
/undo                take the last question and its answer back
/reset               forget what was said, and the images
/set NAME=VALUE ...  for instance temperature=0.2; alone: what is set
/save FILE           write the conversation as JSON
/boxes FILE          draw the boxes of the last answer into the last image, for instance boxes.png
/help                this
/quit                or Ctrl-D; Ctrl-C stops an answer, twice within a second also a pipe
//text               a question that begins with /text"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.parser(
        "chat",
        "Talk with a model about images. Sampled as the original's chat samples; "
        "--temperature=0 always gives the likeliest answer.",
    )
    p.add_argument(
        "--image", action="append", default=[], metavar="FILE",
        help="comes with the first question; may be given several times",
    )  # fmt: skip
    p.add_argument("--prompt", metavar="TEXT", help="print the answer to this question and end; "
                   "without it, a conversation: /help lists its commands")  # fmt: skip
    p.add_argument("--task", choices=TASKS, help="ask as MiniGPT-v2 knows this task; --prompt is the "
                   "phrase, the question, or for identify the box x1,y1,x2,y2 in pixels")  # fmt: skip
    p.add_argument("--save-image", type=Path, metavar="FILE",
                   help="with --prompt: draw the boxes of the answer into the image")  # fmt: skip
    common.add_choices(p, "defaults: the original's chat")
    args = p.parse_args(argv)
    if args.task in BARE_TASKS and args.prompt is None:
        args.prompt = ""
    return args


def options(model: "Model", args: argparse.Namespace) -> dict[str, Any]:
    defaults = DEFAULTS_V2 if model.config.variant == "minigpt-v2" else DEFAULTS
    return common.default_choices() | defaults | common.chosen(args)


class Session:
    """A conversation and what the next question takes with it. Answers go to stdout, notes to stderr."""

    def __init__(self, model: "Model", args: argparse.Namespace):
        self.talk = model.conversation(args.system, args.template)
        self.options = options(model, args)
        self.extra_bos = args.extra_bos
        self.images: list[str] = list(args.image)  # of the next question
        self._saved: set[Path] = set()

    def handle(self, line: str) -> bool:
        """Do what a line says; False when it ends the session. UserError: as it was before."""
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line.removeprefix("/"))
            return True
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        if name not in COMMANDS:
            known = ", ".join(f"/{c}" for c in [*COMMANDS, "quit"])
            raise UserError(f"/{name} is not a command; there are {known}")
        COMMANDS[name](self, rest.strip())
        return True

    def answer(self, question: str) -> str:
        """The answer to the next question, without showing it."""
        with _notes():
            return self.talk.ask(question, self.images, extra_bos=self.extra_bos, **self.options)

    def _ask(self, question: str) -> None:
        with _notes():
            pieces = self.talk.stream(
                question, self.images, extra_bos=self.extra_bos, **self.options
            )
        turns = len(self.talk.turns)
        try:
            self._show(pieces)
        finally:
            if len(self.talk.turns) > turns:  # not stopped before its first word
                self.images = []

    def _show(self, pieces: Generator[str]) -> None:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:
            pieces.close()  # what was shown is kept
            print(flush=True)

    def image(self, text: str) -> None:
        from minigpt4_jax.processing.images import open_image

        names = [text] if os.path.isfile(text) else _words(text)  # a name with spaces as it is
        files = [os.path.expanduser(name) for name in names]
        if not files:
            raise UserError("/image needs a file, for instance /image photo.jpg")
        for name in files:
            open_image(name)
        self.images += files
        note(f"{len(self.images)} image{'s'[: len(self.images) > 1]} with the next question")

    def retry(self, _: str) -> None:
        options = {name: v for name, v in self.options.items() if name != "seed"}  # the next one
        with _notes():
            pieces = self.talk.stream_retry(**options)
        self._show(pieces)

    def undo(self, _: str) -> None:
        turn = self.talk.undo()
        self.images = [str(image) for image in turn.images] + self.images
        note(f"took back: {turn.question}")

    def reset(self, _: str) -> None:
        self.talk.reset()
        self.images = []
        note("forgot the conversation; /image adds an image")

    def set(self, text: str) -> None:
        from minigpt4_jax.inference.generation_config import GenerationConfig

        new = self.options | dict(map(common.parse_choice, _words(text)))
        GenerationConfig.of(new)
        self.options = new
        note("  ".join(f"{name}={value}" for name, value in new.items()))

    def save(self, text: str) -> None:
        names = _words(text)
        if len(names) != 1:
            raise UserError("/save needs one file, for instance /save talk.json")
        path = Path(names[0]).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise UserError(f"{path} is there already; choose another name")
        document = json.dumps(self.talk.transcript(), indent=1, ensure_ascii=False) + "\n"
        try:  # file names may hold bytes that are no UTF-8
            write_text_atomically(path, document, errors="backslashreplace")
        except OSError as e:
            raise write_error(path, e) from None
        self._saved.add(path.resolve())
        note(f"wrote {path}")

    def boxes(self, text: str) -> None:
        names = _words(text)
        if len(names) != 1:
            raise UserError("/boxes needs one file, for instance /boxes boxes.png")
        path = Path(names[0]).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise UserError(f"{path} is there already; choose another name")
        self.save_image(path)
        self._saved.add(path.resolve())

    def save_image(self, path: Path) -> None:
        """Draw the boxes of the last answer into the last image there was."""
        from minigpt4_jax.visualization.boxes import draw_boxes, save

        images = [image for turn in self.talk.turns for image in turn.images]
        if not images:
            raise UserError("there is no image with an answer yet; ask about one first")
        save(draw_boxes(images[-1], self.talk.turns[-1].answer), path)
        note(f"wrote {path}")

    def help(self, _: str) -> None:
        note(HELP)


COMMANDS: dict[str, Callable[[Session, str], None]] = {
    "image": Session.image, "retry": Session.retry, "undo": Session.undo, "reset": Session.reset,
    "set": Session.set, "save": Session.save, "boxes": Session.boxes, "help": Session.help,
}  # fmt: skip


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    """Show warnings, as that of a conversation which is cut, as notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        note(f"note: {warning.message}")


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(
            f"{text}: {e}; quote a name with spaces, as in '/image \"my cat.jpg\"'"
        ) from e


def terminal(session: Session) -> int:
    """Questions from a terminal, with line editing, history and completion, until Ctrl-D."""
    with _line_editing():
        note("Ask about the image. /help lists commands, Ctrl-C stops an answer, Ctrl-D ends.")
        while True:
            try:
                line = input("> ").strip()
                if line and not session.handle(line):
                    return 0
            except UserError as e:
                note(f"error: {e}")
            except KeyboardInterrupt:
                note("")
            except EOFError:
                note("")
                return 0


def pipe(session: Session) -> int:
    """One line of standard input after the other; exit code 2 when one of them went wrong. Ctrl-C
    stops an answer; between answers, and soon after another, it ends the program."""
    code, stopped = 0, -math.inf
    for line in sys.stdin:
        try:
            if line.strip() and not session.handle(line.strip()):
                break
        except UserError as e:
            note(f"error: {e}")
            code = 2
        except KeyboardInterrupt:
            before, stopped = stopped, time.monotonic()
            if stopped - before < 1:
                raise
    return code


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    try:
        import readline
    except ImportError:  # not on Windows: lines are read without it
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    history = Path(state) / "minigpt4_jax" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_completer_delims(" \t")
    readline.set_completer(_complete)
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)


def _complete(text: str, number: int) -> str | None:
    """The `number`-th completion of a word: a command at the start of the line, else a file."""
    import glob
    import readline

    if readline.get_begidx() == 0:
        found = [f"/{name} " for name in [*COMMANDS, "quit"] if f"/{name}".startswith(text)]
    else:
        names = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
        found = [name + "/" * os.path.isdir(name) for name in names]
    return found[number] if text and number < len(found) else None


def _question(args: argparse.Namespace) -> str:
    """What --prompt and --task ask; all they say is checked before the model is read."""
    from minigpt4_jax.processing.images import open_image
    from minigpt4_jax.processing.tasks import question

    if args.task is None:
        if not args.prompt.strip():
            raise UserError("--prompt is empty; expected a question")
        return args.prompt
    if not args.image:
        raise UserError(f"--task={args.task} asks about an image: --image=FILE is missing")
    return question(args.task, args.prompt, open_image(args.image[-1]).size)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # what is not in its encoding ends no conversation
            stream.reconfigure(errors="replace")
    from minigpt4_jax.processing.images import open_image

    for path in args.image:  # before the model is read, which may take minutes
        open_image(path)
    question = None if args.prompt is None else _question(args)
    if question is None and (args.task or args.save_image):
        option, instead = (
            ("--task", "type [refer] ...") if args.task else ("--save-image", "/boxes")
        )
        raise UserError(f"{option} needs --prompt=TEXT; in a conversation {instead}")
    if args.save_image:
        from minigpt4_jax.visualization.boxes import check_file

        if not args.image:
            raise UserError("--save-image draws into an image: --image=FILE is missing")
        check_file(args.save_image)
    session = Session(common.load(args), args)
    if question is None:
        return terminal(session) if sys.stdin.isatty() else pipe(session)
    print(session.answer(question))
    if args.save_image:
        session.save_image(args.save_image)
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
