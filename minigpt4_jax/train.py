"""`python -m minigpt4_jax.train --config=NAME --workdir=DIR ...`: train a model (cli/train.py)."""

from minigpt4_jax.cli.train import run

if __name__ == "__main__":
    run()
