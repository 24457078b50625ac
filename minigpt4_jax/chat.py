"""python -m minigpt4_jax.chat --model=DIR --image=F --prompt="...": ask about an image, print the answer."""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minigpt4_jax.compilation import enable_compilation_cache
from minigpt4_jax.errors import Parser, UserError, run

if TYPE_CHECKING:
    from minigpt4_jax.api import Model

# The original's chat (demo.py, demo_v2.py and Chat.answer_prepare in conversation.py)
DEFAULTS: dict[str, float | int] = {
    "temperature": 1.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.05, "max_new_tokens": 300,
}  # fmt: skip
DEFAULTS_V2 = DEFAULTS | {"temperature": 0.6, "max_new_tokens": 500}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = Parser(
        prog="python -m minigpt4_jax.chat",
        description="Ask a model about images. Sampled as the original's chat samples; "
        "--temperature=0 always gives the likeliest answer.",
    )
    p.add_argument("--model", required=True, metavar="DIR", help="model directory")
    p.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="may be given several times"
    )
    p.add_argument("--prompt", metavar="TEXT", help="the question; without it, questions are read "
                   "from standard input, one a line")  # fmt: skip
    p.add_argument("--system", metavar="TEXT", help="replaces the template's system message")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), help="of the large matrices")
    p.add_argument("--temperature", type=float, help="0 is greedy (1.0; MiniGPT-v2: 0.6)")
    p.add_argument("--top_p", type=float, help="(0.9)")
    p.add_argument("--top_k", type=int, help="0 is off (50)")
    p.add_argument("--repetition_penalty", type=float, help="1 is off (1.05)")
    p.add_argument("--max_new_tokens", type=int, help="(300; MiniGPT-v2: 500)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--no-extra-bos", dest="extra_bos", action="store_false",
        help="leave out the second BOS that released Llama-2 and MiniGPT-v2 weights are used with",
    )  # fmt: skip
    return p.parse_args(argv)


def answer(model: "Model", args: argparse.Namespace, question: str) -> str:
    """The answer to one question about args.image, in the model's chat template."""
    from minigpt4_jax.prompts import CHAT_CONTEXT, chat_template, render_chat, with_images

    options = DEFAULTS_V2 if model.config.variant == "minigpt-v2" else DEFAULTS
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    chosen: dict[str, Any] = options | given
    prompt = render_chat(
        chat_template(model.config),
        [(with_images(question, len(args.image)), None)],
        system=args.system,
        extra_bos=args.extra_bos,
    )
    return model.generate(
        [args.image], [prompt], seed=args.seed, extra_bos=args.extra_bos,
        context=CHAT_CONTEXT, **chosen,
    )[0]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.prompt is not None and not args.prompt.strip():
        raise UserError("--prompt is empty; expected a question")
    from minigpt4_jax.api import load
    from minigpt4_jax.images import open_image

    for path in args.image:  # before the model is read, which may take minutes
        open_image(path)
    enable_compilation_cache()
    model = load(args.model, args.dtype)
    if args.prompt is not None:
        print(answer(model, args, args.prompt))
        return
    if sys.stdin.isatty():
        print("One question a line, each on its own; end with Ctrl-D.", file=sys.stderr)
    for line in sys.stdin:
        if line.strip():
            print(answer(model, args, line.strip()), flush=True)


if __name__ == "__main__":
    run(main)
