"""`python -m minigpt4_jax.chat ...`: talk with a model about images in a terminal (cli/chat.py)."""

from minigpt4_jax.cli.chat import run

if __name__ == "__main__":
    run()
