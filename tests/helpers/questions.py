"""A source of random questions. Worker processes import this module, and not that of the tests."""

from minigpt4_jax.data.json_records import Example
from minigpt4_jax.errors import DataError
from minigpt4_jax.processing.chat_templates import IMAGE_SLOT


class Questions:
    """A Source with random questions; the answer identifies the example."""

    dropped: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, name, photos, invalid=()):
        self.name, self._photos, self._invalid = name, photos, invalid

    def __len__(self):
        return len(self._photos)

    def example(self, index, rng):
        if index in self._invalid:
            raise DataError(f"{self.name} {index}: a torn row", "row that is torn")
        question = f"{IMAGE_SLOT} {rng.integers(10)}?"
        return Example((self._photos[index],), (question,), (f"{self.name}{index}",))
