"""What a dataset is to training: examples by number, some of them drawn anew each time."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from minigpt4_jax.data.json_records import Example


class Source(Protocol):
    """A dataset opened for training.

    name: what logs and errors call it. dropped: rows of the files that are not among the examples,
    counted by cause when the dataset was opened, such as {"no such image": 12}. left_out: the same of
    rows that nothing is wrong with and that the dataset's own rule leaves out, such as another split.
    """

    @property
    def name(self) -> str: ...

    @property
    def dropped(self) -> Mapping[str, int]: ...

    @property
    def left_out(self) -> Mapping[str, int]: ...

    def __len__(self) -> int: ...

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example number `index` (0 <= index < len): a function of the index and of what rng draws
        (a phrasing, one of a picture's captions, an answer), and of nothing else.

        Questions come without prompt template; the first has `<Img><ImageHere></Img>` for each
        image. No questions: the answer is a caption that stands alone."""
        ...


class ExampleList:
    """A Source of examples that are the same every time, such as read_sources gives."""

    def __init__(self, name: str, examples: Sequence[Example]):
        self.name = name
        self.dropped: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        return self.examples[index]
