"""Cost of quantization: perplexity and greedy answers of a language model, by scheme.

    python benchmarks/quality.py --model=DIR [--precision=float32,int8,int4] [--stored=DIR]
                                 [--data=SPLIT [--count=60]] [--tokens=24]

DIR is a model directory in floats (for SmolLM2: `python -m convert build --llm=...`). Prints for each scheme
the perplexity over the texts below and two comparisons with the answers of the first scheme: how many are
identical, and the share of words before the first difference. --stored: also evaluate this directory as it is
(from `convert build --quantize=keep`). --data: a split written by minigpt4_jax.shapes.dataset, for a model
trained on it (the quickstart's `stage2/model` and `shapes/heldout`): descriptions of its first images
instead of the texts and questions, and the share of descriptions that are entirely right.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import Table, argument_parser

import minigpt4_jax
from minigpt4_jax.demos.quickstart import evaluate_split
from minigpt4_jax.errors import run

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
    def negative_log_likelihood(
        leaves: list[jax.Array], tokens: jax.Array, lengths: jax.Array
    ) -> jax.Array:
        llm = model.engine._model(leaves).llm
        log_probs = jax.nn.log_softmax(llm.logits(llm(llm.embed_tokens(tokens), lengths)))
        targets = jnp.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=2)[:, :, 0]
        return -jnp.where(jnp.arange(1, tokens.shape[1]) < lengths[:, None], targets, 0).sum()

    total = float(negative_log_likelihood(model.engine._leaves, tokens, lengths))
    return math.exp(total / float((lengths - 1).sum()))


def agreement(answers: list[str], reference: list[str]) -> tuple[int, float]:
    """(number of identical answers, mean share of words before the first difference)"""
    shares = []
    for a, b in zip(answers, reference, strict=True):
        words, expected = a.split(), b.split()
        same = 0
        while same < min(len(words), len(expected)) and words[same] == expected[same]:
            same += 1
        shares.append(same / max(len(words), len(expected), 1))
    identical = sum(a == b for a, b in zip(answers, reference, strict=True))
    return identical, float(np.mean(shares))


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--precision", default="float32,int8,int4", help="schemes; the first is the reference"
    )
    parser.add_argument("--tokens", type=int, default=24, help="of an answer (default: 24)")
    parser.add_argument("--stored", type=Path, help="a directory to evaluate as it is")
    parser.add_argument("--data", type=Path, help="a split of shapes, to evaluate on its images")
    parser.add_argument("--count", type=int, default=60, help="images of it (default: 60)")
    args = parser.parse_args()
    columns = {
        "precision": (11, ""),
        "perplexity": (11, ".3f"),
        "same answers": (14, ""),
        "same words": (12, ".0%"),
    }
    table = Table(columns | ({"exact": (10, ".0%")} if args.data else {}))
    reference: list[str] | None = None
    for precision in [*args.precision.split(","), *(["stored"] if args.stored else [])]:
        quantize = precision if precision.startswith("int") else None
        dtype = "float32" if quantize or precision == "stored" else precision
        folder = args.stored if precision == "stored" else args.model
        model = minigpt4_jax.load(folder, dtype, quantize=quantize)
        exact = []
        if args.data:
            judged = evaluate_split(model, args.data, args.count, stage2=True)
            answers, value, exact = judged.texts, math.exp(judged.loss), [judged.exact]
        else:
            answers = model.generate(None, QUESTIONS, template=True, max_new_tokens=args.tokens)
            value = perplexity(model)
        reference = reference or answers
        identical, share = agreement(answers, reference)
        table.row(precision, value, f"{identical} of {len(answers)}", share, *exact)


if __name__ == "__main__":
    run(main)
