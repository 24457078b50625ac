"""`python -m minigpt4_jax.batch ...`: answer many questions from a JSONL file (cli/batch.py)."""

from minigpt4_jax.cli.batch import run

if __name__ == "__main__":
    run()
