"""Rank candidate answers to a question about an image, the most likely first.

python examples/rank_answers.py photos/1.jpg "What colour is it?" red green blue
"""

import argparse

import minigpt4_jax

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("image")
parser.add_argument("question")
parser.add_argument("answers", nargs="+")
parser.add_argument("--model", default="quickstart/stage2/model")
args = parser.parse_args()

model = minigpt4_jax.load(args.model)

# nll: the negative log-likelihood of each answer's tokens, its end symbol included.
rows = len(args.answers)
nll, tokens = model.score([args.image] * rows, [args.question] * rows, args.answers, template=True)

for loss, count, answer in sorted(zip(nll, tokens, args.answers, strict=True)):
    print(f"{loss:8.2f}  {loss / count:6.2f} a token  {answer}")
