"""python -m minigpt4_jax.chat --model=DIR [--image=F ...]: talk with a model about images in a terminal.

With --prompt it prints one answer. Otherwise it reads questions from the terminal, or one per line from
a pipe, as one conversation. A line that starts with `/` is a command.
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
from minigpt4_jax.cli.line_editing import line_editing
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.tasks import BARE_TASKS, TASKS
from minigpt4_jax.storage.atomic import write_error, write_text_atomically

if TYPE_CHECKING:
    from minigpt4_jax.inference.model import Model
    from minigpt4_jax.inference.text_generator import TextGenerator

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


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.make_parser(
        "chat",
        "Talk with a model about images. Samples as the original's chat does; --temperature=0 always "
        "gives the most likely answer.",
    )
    p.add_argument(
        "--image", action="append", default=[], metavar="FILE",
        help="image of the first question; may be repeated",
    )  # fmt: skip
    p.add_argument("--prompt", metavar="TEXT", help="print the answer to this question and exit; "
                   "without it, start a conversation (/help lists its commands)")  # fmt: skip
    p.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation that /save or the "
                   "web page wrote")  # fmt: skip
    p.add_argument("--task", choices=TASKS, help="use MiniGPT-v2's prompt for this task; --prompt is the "
                   "phrase, the question, or for identify the box x1,y1,x2,y2 in pixels")  # fmt: skip
    p.add_argument("--save-image", type=Path, metavar="FILE",
                   help="with --prompt: draw the boxes of the answer into the image")  # fmt: skip
    common.add_generation_options(p, "defaults: the original's chat", excluded=EXCLUDED)
    args = p.parse_args(argv)
    if args.task in BARE_TASKS and args.prompt is None:
        args.prompt = ""
    return args


def generation_options(variant: str, args: argparse.Namespace) -> dict[str, Any]:
    """The original chat's options for this variant, with those of the command line. UserError: wrong."""
    from minigpt4_jax.inference.generation_config import GenerationConfig

    defaults = DEFAULTS_V2 if variant == "minigpt-v2" else DEFAULTS
    if (args.num_beams or 1) > 1:  # beam search does not sample
        defaults = {k: v for k, v in defaults.items() if k not in common.SAMPLING_OPTIONS}
    options = common.default_options() | defaults | common.given_options(args)
    GenerationConfig(**options)
    if options["context"] is None:  # the conversation's own default
        del options["context"]
    return options


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
        self.options = generation_options(model.config.variant, args)
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
        """Process a line; False when it ends the session. UserError: the session is unchanged."""
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line.removeprefix("/"))
            return True
        name, _, rest = line[1:].partition(" ")
        if name in ("quit", "exit"):
            return False
        if name not in COMMANDS:
            known = ", ".join(f"/{c}" for c in [*COMMANDS, "quit"])
            raise UserError(f"/{name} is not a command; known are {known}")
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
            _print_pieces(pieces)
        finally:
            if len(self.conversation.turns) > num_turns:  # not stopped before its first token
                self.images = []

    # --- commands ---------------------------------------------------------------------------

    def image(self, text: str) -> None:
        from minigpt4_jax.processing.images import open_image

        # a name with spaces need not be quoted
        names = [text] if os.path.isfile(os.path.expanduser(text)) else _split_words(text)
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
        _print_pieces(pieces)

    def undo(self, _: str) -> None:
        turn = self.conversation.undo()
        self.images = [str(image) for image in turn.images] + self.images
        note(f"removed: {turn.question}")

    def reset(self, _: str) -> None:
        self.conversation.reset()
        self.images = []
        note("started a new conversation; /image adds an image")

    def set(self, text: str) -> None:
        from minigpt4_jax.inference.generation_config import GenerationConfig

        changes = common.parse_options(_split_words(text))
        for name in changes.keys() & set(EXCLUDED):
            raise UserError(
                f"{name} is not an option of a conversation, which goes on with one answer"
            )
        options = self.options | changes
        GenerationConfig(**options)
        self.options = options
        shown = {name: value for name, value in options.items() if name not in EXCLUDED}
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
        names = _split_words(text)
        if len(names) != 1:
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


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _print_pieces(pieces: Generator[str]) -> None:
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        pieces.close()  # the conversation keeps what was printed
        print(flush=True)


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


def terminal(session: Session) -> int:
    """Read questions from a terminal, with line editing, history and completion, until Ctrl-D."""
    options = [name for name in common.GENERATION_OPTIONS if name not in EXCLUDED]
    with line_editing(COMMANDS, options):
        note("Ask about the image. /help lists commands, Ctrl-C stops an answer, Ctrl-D exits.")
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
    """Process standard input line by line; exit code 2 if any line failed.

    Ctrl-C stops an answer; between answers, or again within a second, it ends the program.
    """
    code, last_interrupt = 0, -math.inf
    for line in sys.stdin:
        try:
            if line.strip() and not session.handle(line.strip()):
                break
        except UserError as e:
            note(f"error: {e}")
            code = 2
        except KeyboardInterrupt:
            previous, last_interrupt = last_interrupt, time.monotonic()
            if last_interrupt - previous < 1:
                raise
    return code


def _question(args: argparse.Namespace) -> str:
    """The question of --prompt and --task. UserError: they are empty or do not fit."""
    from minigpt4_jax.processing.images import open_image
    from minigpt4_jax.processing.tasks import question

    if args.task is None:
        prompt: str = args.prompt
        if not prompt.strip():
            raise UserError("--prompt is empty; expected a question")
        return prompt
    if not args.image:
        raise UserError(f"--task={args.task} asks about an image: --image=FILE is missing")
    return question(args.task, args.prompt, open_image(args.image[-1], exif=args.exif).size)


def _check_arguments(args: argparse.Namespace) -> str | None:
    """The question of --prompt, None for a conversation.

    Checks everything that can be checked before the model is loaded, which may take minutes.
    """
    from minigpt4_jax.inference.transcript import read_transcript
    from minigpt4_jax.processing.images import open_image

    generation_options("", args)
    for path in args.image:
        open_image(path)
    if args.load is not None:
        read_transcript(args.load)
    question = None if args.prompt is None else _question(args)
    if question is None and (args.task or args.save_image):
        option, instead = "--save-image", "/boxes"
        if args.task:
            option, instead = "--task", "type [refer] ..."
        raise UserError(f"{option} needs --prompt=TEXT; in a conversation {instead}")
    if args.save_image:
        from minigpt4_jax.visualization.boxes import check_file

        if not args.image:
            raise UserError("--save-image draws into an image: --image=FILE is missing")
        check_file(args.save_image)
    return question


def _plan(planned: "TextGenerator", args: argparse.Namespace, question: str | None) -> None:
    """Plan the first answer. If its question is not known yet: a short one, with one image."""
    from PIL import Image

    from minigpt4_jax.inference.compile_ahead import compile_answer
    from minigpt4_jax.inference.conversation import Conversation

    conversation = Conversation(planned, args.system, args.template)
    images: list[Any] = list(args.image)
    if question is None:
        question, images = "Describe this image.", images or [Image.new("RGB", (8, 8))]
    options = generation_options(planned.config.variant, args)
    compile_answer(
        planned, conversation.request(question, images, extra_bos=args.extra_bos, **options)
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # undecodable characters end no conversation
            stream.reconfigure(errors="replace")
    question = _check_arguments(args)
    loading = common.begin_loading(args)
    from minigpt4_jax.inference.compile_ahead import ProgramCompiler

    with ProgramCompiler(loading.model) as compiler:
        compiler.start(lambda planned: _plan(planned, args, question))
        session = Session(loading.finish(), args, before_answer=compiler.wait)
        if question is None:
            return terminal(session) if sys.stdin.isatty() else pipe(session)
        print(session.answer(question))
    if args.save_image:
        session.save_image(args.save_image)
    return 0


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and end the process; a UserError is one line on stderr."""
    errors.run(lambda: main(argv))
