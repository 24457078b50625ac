"""`python -m minigpt4_jax.data check CONFIG`: check datasets (cli/check_data.py)."""

from minigpt4_jax.cli.check_data import run

if __name__ == "__main__":
    run()
