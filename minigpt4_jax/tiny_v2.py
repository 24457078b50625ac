"""`python -m minigpt4_jax.tiny_v2`: MiniGPT-v2's tasks in small (demos/tiny_v2.py)."""

from minigpt4_jax.demos.tiny_v2 import run

if __name__ == "__main__":
    run()
