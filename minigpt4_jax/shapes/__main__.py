"""`python -m minigpt4_jax.shapes --out=DIR`: write the generated dataset (dataset.py)."""

from minigpt4_jax import errors
from minigpt4_jax.shapes.dataset import main

if __name__ == "__main__":
    errors.run(main)
