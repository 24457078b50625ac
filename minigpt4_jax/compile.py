"""`python -m minigpt4_jax.compile ...`: see cli/compile.py."""

from minigpt4_jax.cli.compile import run

if __name__ == "__main__":
    run()
