"""What a benchmark is: rows to answer, how answers are read and scored, published figures.

Every benchmark is one file in `benchmarks/`, which builds a `Benchmark` of functions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

RowId: TypeAlias = str | int
# The text of an answer. For referring expressions also the texts of all rounds of asking again; for
# multiple choice also the index of a choice, or the losses of all choices, also several kinds of them.
Answer: TypeAlias = str | int | list[str] | list[float] | dict[str, list[float]]
Kind: TypeAlias = Literal["text", "box", "yes_no", "choice", "caption"]


@dataclass(frozen=True)
class Row:
    """A question about an image.

    Attributes:
        id: what predictions name the row by.
        question: goes into the chat template as it is.
        images: where the image may be, below the data root, most likely place first; none: text only.
        truth: what the benchmark's `judge` compares the answer with.
        candidates: the choices, where there are any.
        group: a part of the benchmark that is also scored alone, such as a file of POPE.
    """

    id: RowId
    question: str
    images: tuple[str, ...]
    truth: Any
    candidates: tuple[str, ...] = ()
    group: str = ""


@dataclass(frozen=True)
class Result:
    """The scores of a benchmark.

    Attributes:
        score: the headline figure, in percent.
        original: figures as the original's script or the published protocol computes them.
        official: figures of the benchmark's own protocol, where it differs.
        per_row: {"id", "answer", "score" in percent, ...} of each row, in order.
        extra: further figures that are written beside these.
    """

    score: float
    original: Mapping[str, Any]
    official: Mapping[str, Any]
    per_row: Sequence[Mapping[str, Any]]
    extra: Mapping[str, Any] = field(default_factory=dict)


class Published(NamedTuple):
    """A figure that others published; percent."""

    model: str
    score: float
    source: str
    split: str = ""


class DataFile(NamedTuple):
    """A file or folder that a benchmark needs, and where people get it.

    paths: below the data root; one of them suffices. {split} stands for the split.
    """

    paths: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: as `--benchmark` takes it.
        title: for reports.
        kind: of its answers.
        metric: what `score` is.
        folder: below the data root, where its annotations are.
        files: annotation files.
        images: folders of images.
        read: (folder or file, split) -> rows. UserError: files that are missing or of another layout.
        judge: (rows, an answer for each) -> Result.
        splits: those that are run by default; empty: the benchmark has one.
        max_new_tokens: of an answer. Decoding is greedy.
        ranked: the answer is the best of a row's candidates instead of a generated text.
        higher_is_better: whether a higher score is a better one.
        headline: the score of some rows, from their entries in `Result.per_row`; None: the mean of their
            scores.
        published: figures of others.
    """

    name: str
    title: str
    kind: Kind
    metric: str
    folder: str
    files: tuple[DataFile, ...]
    images: tuple[DataFile, ...]
    read: Callable[[Path, str], list[Row]]
    judge: Callable[[Sequence[Row], Sequence[Answer]], Result]
    splits: tuple[str, ...] = ()
    max_new_tokens: int = 20
    ranked: bool = False
    higher_is_better: bool = True
    headline: Callable[[Sequence[Mapping[str, Any]]], float] | None = None
    published: tuple[Published, ...] = ()
