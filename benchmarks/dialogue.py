"""Fifth question of a conversation: with the cache of the earlier turns, and with them read again.

    python benchmarks/dialogue.py --model=DIR [--rounds=5] [--precision=float32] [--kv-cache=int8|float8]

In every round four questions are asked. The fifth is put to that conversation, which reuses its cache, and
to a new one with the same four turns, which has to read them. Prints seconds until the first token and until
an answer of at most 60 tokens, as medians of the rounds (the order alternates; the first round compiles and
is not counted), their ratio, and whether the answers are the same.
"""

import statistics
import time
from pathlib import Path

from common import Table, argument_parser

import minigpt4_jax
from minigpt4_jax.config import KV_CACHES
from minigpt4_jax.errors import run
from minigpt4_jax.inference.conversation import Conversation

QUESTIONS = (
    "Tell me about rivers in two sentences, please.",
    "And what lives in them?",
    "Which of these animals is the largest?",
    "How long does it live?",
    "Where can I see one?",
)
MAX_TOKENS = 60  # of an answer


def ask_fifth(conversation: Conversation, max_new_tokens: int) -> tuple[float, str]:
    """(seconds until the last question is answered, the answer)"""
    start = time.perf_counter()
    answer = conversation.ask(QUESTIONS[-1], max_new_tokens=max_new_tokens)
    return time.perf_counter() - start, answer


def run_round(
    model: minigpt4_jax.Model, max_new_tokens: int, reread_first: bool
) -> dict[str, tuple[float, str]]:
    reused, reread = model.conversation(), model.conversation()
    for question in QUESTIONS[:-1]:
        reused.ask(question, max_new_tokens=MAX_TOKENS)
    reread.turns = list(reused.turns)
    sides = [("reused", reused), ("reread", reread)]
    order = reversed(sides) if reread_first else sides
    return {name: ask_fifth(conversation, max_new_tokens) for name, conversation in order}


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="float32", help="float32, bfloat16, int8 or int4")
    parser.add_argument("--kv-cache", choices=KV_CACHES)
    args = parser.parse_args()
    quantize = args.precision if args.precision.startswith("int") else None
    model = minigpt4_jax.load(
        args.model, "float32" if quantize else args.precision,
        quantize=quantize, kv_cache=args.kv_cache,
    )  # fmt: skip
    table = Table(
        {
            "tokens": (6, ""),
            "reused, s": (12, ".3f"),
            "reread, s": (12, ".3f"),
            "reused / reread": (17, ".2f"),
            "same answer": (14, ""),
        }
    )
    for tokens in (1, MAX_TOKENS):
        rounds = [run_round(model, tokens, bool(i % 2)) for i in range(args.rounds + 1)]
        reused, reread = (
            statistics.median(r[side][0] for r in rounds[1:]) for side in ("reused", "reread")
        )
        same = all(r["reused"][1] == r["reread"][1] for r in rounds)
        table.row(tokens, reused, reread, reused / reread, str(same))


if __name__ == "__main__":
    run(main)
