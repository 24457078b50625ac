"""`python -m minigpt4_jax.quickstart`: train a small model from nothing (demos/quickstart.py)."""

from minigpt4_jax.demos.quickstart import run

if __name__ == "__main__":
    run()
