"""`python -m minigpt4_jax.curate COMMAND ...`: make training data from images (cli/curate.py)."""

from minigpt4_jax.cli.curate import run

if __name__ == "__main__":
    run()
