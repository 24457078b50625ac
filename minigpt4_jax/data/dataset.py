"""A dataset as training sees it: examples by number."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from minigpt4_jax.data.json_records import Example


class Source(Protocol):
    """A dataset opened for training, with random access.

    name: its name in logs and errors. dropped: invalid rows of the files that are not among the
    examples, counted by cause when the dataset was opened, such as {"without their image": 12}.
    left_out: the same for valid rows that the dataset's definition excludes, such as another split.
    """

    @property
    def name(self) -> str: ...

    @property
    def dropped(self) -> Mapping[str, int]: ...

    @property
    def left_out(self) -> Mapping[str, int]: ...

    def __len__(self) -> int: ...

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Example number `index` (0 <= index < len): a function of the index and of what is drawn from
        rng (a phrasing, one of an image's captions, one of several answers).

        Questions have no prompt template; the first one has `<Img><ImageHere></Img>` for each image.
        Without questions, the answer is a caption."""
        ...


class ExampleList:
    """A Source of examples in memory, always the same, such as those of read_sources."""

    def __init__(self, name: str, examples: Sequence[Example]):
        self.name = name
        self.dropped: dict[str, int] = {}
        self.left_out: dict[str, int] = {}
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        return self.examples[index]
