"""`python -m minigpt4_jax.serve ...`: an OpenAI-compatible server (cli/serve.py)."""

from minigpt4_jax.cli.serve import run

if __name__ == "__main__":
    run()
