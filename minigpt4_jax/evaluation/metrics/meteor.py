"""METEOR by the program of its authors, which needs Java and the package pycocoevalcap."""

import importlib.util
import shutil
from collections.abc import Sequence
from typing import NamedTuple


class Meteor(NamedTuple):
    """overall, and of each caption; fractions."""

    overall: float
    per_caption: list[float]


def missing() -> str | None:
    """Why METEOR cannot be computed here, and what to do; None if it can."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        return "METEOR needs pycocoevalcap: pip install 'minigpt4_jax[captions]'"
    if shutil.which("java") is None:
        return "METEOR needs Java, and there is no program `java`; install a JRE, for instance default-jre"
    return None


def meteor(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Meteor:
    """METEOR 1.5 of tokenized captions (joined by spaces). Only if nothing is `missing`."""
    from pycocoevalcap.meteor.meteor import Meteor as Program

    program = Program()
    try:
        overall, scores = program.compute_score(
            {i: list(of_image) for i, of_image in enumerate(references)},
            {i: [caption] for i, caption in enumerate(captions)},
        )
    finally:
        program.meteor_p.kill()
        program.meteor_p.wait()
    return Meteor(float(overall), [float(score) for score in scores])
