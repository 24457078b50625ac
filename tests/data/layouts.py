"""Miniatures of published datasets, written as their authors lay them out."""

import json

from PIL import Image

from minigpt4_jax.data.datasets import open_dataset


class Disk:
    """A folder that files and pictures are put in."""

    def __init__(self, root):
        self.root = root

    def json(self, name, value):
        return self.text(name, json.dumps(value))

    def text(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def bytes(self, name, data):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def picture(self, name, size=(8, 6)):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
        return str(path)

    def open(self, name, annotations, images=None, **options):
        return open_dataset(
            name, self.root / annotations, None if images is None else self.root / images, **options
        )


class EachInTurn:
    """Stands for a generator: `integers` gives the numbers it was made with."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)
        self.limits = []

    def integers(self, limit):
        self.limits.append(limit)
        number = self.numbers.pop(0)
        assert 0 <= number < limit
        return number


def first_draw(source, index=0, draws=8):
    """The example where the first of everything is drawn."""
    return source.example(index, EachInTurn(*[0] * draws))


def choices(source, index, draws):
    """How many choices each of the draws of an example has."""
    rng = EachInTurn(*[0] * draws)
    source.example(index, rng)
    assert not rng.numbers
    return rng.limits
