"""Arguments of `python -m minigpt4_jax.chat`, for short answers of a small model."""

from pathlib import Path


def arguments(home: Path, *more: str) -> list[str]:
    """The model and the image in `home`, and more arguments."""
    short = ["--max_new_tokens=6", "--dtype=float32"]
    return [f"--model={home / 'model'}", f"--image={home / 'a.png'}", *short, *more]


def ask(home: Path, *more: str) -> list[str]:
    """As `arguments`, with a question and greedy decoding."""
    return arguments(home, "--prompt=what is it", "--temperature=0", *more)
