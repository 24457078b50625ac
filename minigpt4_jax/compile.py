"""`python -m minigpt4_jax.compile ...`: compile for a TPU slice from shapes alone (cli/compile.py)."""

from minigpt4_jax.cli.compile import run

if __name__ == "__main__":
    run()
