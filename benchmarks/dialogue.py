"""The fifth question of a conversation, going on from the cache of the earlier turns and read anew.

    python benchmarks/dialogue.py --model=DIR [--rounds=5] [--precision=float32] [--kv-cache=int8]

In every round four questions are asked; the fifth is put to that conversation and to a new one that
was given the four turns, and so has to read them. Seconds to the first token, and to the whole
answer of at most 60: medians of the rounds, whose order alternates; the first of each compiles and
is not counted.
"""

import argparse
import statistics
import time
from pathlib import Path

import minigpt4_jax
from minigpt4_jax.errors import Parser, run
from minigpt4_jax.inference.conversation import Conversation

QUESTIONS = (
    "Tell me about rivers in two sentences, please.",
    "And what lives in them?",
    "Which of these animals is the largest?",
    "How long does it live?",
    "Where can I see one?",
)
TOKENS = 60  # of an answer at most


def fifth(talk: Conversation, tokens: int) -> tuple[float, str]:
    """Seconds until the last question is answered, and the answer."""
    begin = time.perf_counter()
    answer = talk.ask(QUESTIONS[-1], max_new_tokens=tokens)
    return time.perf_counter() - begin, answer


def one_round(
    model: minigpt4_jax.Model, tokens: int, anew_first: bool
) -> dict[str, tuple[float, str]]:
    reused, anew = model.conversation(), model.conversation()
    for question in QUESTIONS[:-1]:
        reused.ask(question, max_new_tokens=TOKENS)
    anew.turns = list(reused.turns)
    pair = [("reused", reused), ("anew", anew)]
    return {name: fifth(talk, tokens) for name, talk in pair[:: -1 if anew_first else 1]}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="float32", help="float32, bfloat16, int8 or int4")
    parser.add_argument("--kv-cache", choices=["int8"])
    a = parser.parse_args()
    rounded = a.precision.startswith("int")
    model = minigpt4_jax.load(
        a.model, "float32" if rounded else a.precision,
        quantize=a.precision if rounded else None, kv_cache=a.kv_cache,
    )  # fmt: skip
    print(f"{'tokens':>6}{'reused':>10}{'anew':>10}{'reused / anew':>16}   same answer")
    for tokens in (1, TOKENS):
        rounds = [one_round(model, tokens, bool(i % 2)) for i in range(a.rounds + 1)]
        reused, anew = (statistics.median(r[k][0] for r in rounds[1:]) for k in ("reused", "anew"))
        same = all(r["reused"][1] == r["anew"][1] for r in rounds)
        ratio = reused / anew
        print(f"{tokens:6}{reused:9.3f}s{anew:9.3f}s{ratio:16.2f}   {same}", flush=True)


if __name__ == "__main__":
    run(main)
