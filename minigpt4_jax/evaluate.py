"""`python -m minigpt4_jax.evaluate ...`: benchmarks of a model, scores of given answers (cli/evaluate.py)."""

from minigpt4_jax.cli.evaluate import run

if __name__ == "__main__":
    run()
