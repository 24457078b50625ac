"""python -m minigpt4_jax.chat --model=DIR [--image=F ...]: talk with a model about images in a terminal.

With --prompt it prints one answer. Otherwise it reads questions from the terminal, or one per line from
a pipe, as one conversation. A line that starts with `/` is a command.
"""

import argparse
import io
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from minigpt4_jax import errors
from minigpt4_jax.cli import common
from minigpt4_jax.cli.chat_session import (
    COMMANDS,
    EXCLUDED,
    Session,
    generation_options,
)
from minigpt4_jax.cli.common import note
from minigpt4_jax.cli.line_editing import line_editing
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.tasks import BARE_TASKS, TASKS

if TYPE_CHECKING:
    from minigpt4_jax.inference.text_generator import TextGenerator


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
    loading = common.begin_loading(args, lambda variant: generation_options(variant, args))
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
