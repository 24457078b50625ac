"""What rounding the weights costs: perplexity and greedy answers of a language model, by scheme.

    python benchmarks/quality.py --model=DIR [--precision=float32,int8,int4] [--stored=DIR]
                                 [--data=SPLIT [--count=60]] [--tokens=24]

DIR is a model directory in floats (of SmolLM2: `python -m convert build --llm=...`). Perplexity is
over the texts below. Answers are compared with those in float32: how many are the same word for word,
and the share of words before the first that differs. --stored: another directory, compared as it is
(of `convert build --quantize=keep`). --data: a split that minigpt4_jax.shapes.dataset wrote, for a model
that was trained on it (the quickstart's `stage2/model` and `data/heldout`): descriptions of its first
images instead of the texts and questions, and the share that is entirely right.
"""

import argparse
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import minigpt4_jax
from minigpt4_jax.demos.quickstart import judge_split
from minigpt4_jax.errors import Parser, run

TEXTS = (
    "The lighthouse keeper climbed the narrow stairs every evening at dusk. He trimmed the wick, "
    "wiped the salt from the glass and wrote the weather into a thick book. On clear nights he could "
    "see the lamps of the fishing boats, and he counted them as they came home.",
    "Plants make sugar from carbon dioxide and water, using the energy of sunlight. The reaction "
    "takes place in small green bodies inside the cells of a leaf. Oxygen is released into the air, "
    "and the sugar feeds the plant or is stored as starch in its roots and seeds.",
    "To bake a simple bread, mix flour, water, salt and a little yeast in a large bowl. Knead the "
    "dough for ten minutes until it is smooth, cover it with a cloth and let it rise for an hour. "
    "Shape it into a loaf, let it rest again and bake it in a hot oven until the crust is brown.",
    "The committee met on Tuesday to discuss the new bridge. Several members asked why the cost had "
    "risen by a third since last year, and the engineer explained that the ground on the northern "
    "bank was softer than expected. A decision was put off until the spring.",
)
QUESTIONS = (
    "What is the capital of France?",
    "How many days are there in a week?",
    "Which planet do we live on?",
    "What color is the sky on a clear day?",
    "What do bees make?",
    "Who wrote the play Hamlet?",
    "What is the opposite of hot?",
    "What is two plus three?",
    "Which animal says meow?",
    "What is water made of?",
    "In which season do leaves fall from the trees?",
    "Name an ocean.",
)


def perplexity(model: minigpt4_jax.Model) -> float:
    """exp of the mean negative log-likelihood of a token, given those before it in its text."""
    rows = [model.tokenizer.encode(text) for text in TEXTS]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in rows], np.int32)

    @jax.jit
    def nll(state: object, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        llm = model._merge(state).llm
        scores = jax.nn.log_softmax(llm.logits(llm(llm.embed_tokens(tokens), lengths)))
        chosen = jnp.take_along_axis(scores[:, :-1], tokens[:, 1:, None], axis=2)[:, :, 0]
        return -jnp.where(jnp.arange(1, tokens.shape[1]) < lengths[:, None], chosen, 0).sum()

    return math.exp(float(nll(model._state, tokens, lengths)) / float((lengths - 1).sum()))


def agreement(ours: list[str], theirs: list[str]) -> tuple[int, float]:
    """(answers that are the same, mean share of words before the first difference)."""
    shares = []
    for a, b in zip(ours, theirs, strict=True):
        words, wanted = a.split(), b.split()
        same = 0
        while same < min(len(words), len(wanted)) and words[same] == wanted[same]:
            same += 1
        shares.append(same / max(len(words), len(wanted), 1))
    return sum(a == b for a, b in zip(ours, theirs, strict=True)), float(np.mean(shares))


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--precision", default="float32,int8,int4", help="the first is compared with"
    )
    parser.add_argument("--tokens", type=int, default=24, help="of an answer (default: 24)")
    parser.add_argument("--stored", type=Path, help="a directory to compare as it is")
    parser.add_argument("--data", type=Path, help="a split of shapes: judged by its images")
    parser.add_argument("--count", type=int, default=60, help="images of it (default: 60)")
    a = parser.parse_args()
    columns = f"{'precision':11}{'perplexity':>11}{'same answers':>14}{'same words':>12}"
    print(columns + ("     exact" if a.data else ""))
    first: list[str] | None = None
    for precision in [*a.precision.split(","), *(["stored"] if a.stored else [])]:
        scheme = precision if precision.startswith("int") else None
        dtype = "float32" if scheme or precision == "stored" else precision
        folder = a.stored if precision == "stored" else a.model
        model = minigpt4_jax.load(folder, dtype, quantize=scheme)
        if a.data:
            judged = judge_split(model, a.data, a.count, stage2=True)
            answers, loss, exact = judged.texts, math.exp(judged.loss), f"{judged.exact:10.0%}"
        else:
            answers = model.generate(None, QUESTIONS, template=True, max_new_tokens=a.tokens)
            loss, exact = perplexity(model), ""
        first = first or answers
        same, share = agreement(answers, first)
        count = f"{same} of {len(answers)}"
        print(f"{precision:11}{loss:11.3f}{count:>14}{share:12.0%}{exact}", flush=True)


if __name__ == "__main__":
    run(main)
