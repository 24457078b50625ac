"""`python -m minigpt4_jax.demo ...`: a web page to talk with a model (cli/demo.py)."""

from minigpt4_jax.cli.demo import run

if __name__ == "__main__":
    run()
