"""Questions and answers about `shapes` scenes in MiniGPT-v2's task format, for `tiny_v2`.

caption    [caption] Briefly describe this image.              a small red circle top left on white
vqa        [vqa] ... What color is the star?                   blue
refer      [refer] give me the location of the red circle      {<3><5><22><24>}
identify   [identify] what is this {<3><5><22><24>}            a small red circle
grounding  [grounding] describe this image in detail           <p>a small red circle</p> {<..>} on white
detection  [detection] circle                                  <p>circle</p> {<..>}<delim>{<..>}
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from minigpt4_jax import tasks
from minigpt4_jax.boxes import Box, format_box, format_boxes
from minigpt4_jax.data.shapes_scene import Object, Scene
from minigpt4_jax.data.shapes_text import questions, references, short


class Asked(NamedTuple):
    """A question with its answer, and what it is about."""

    task: str
    question: str
    answer: str
    box: Box | None = None  # of the object that refer looks for


class Phase(NamedTuple):
    """A stretch of training: how many rows of each task, of scenes with so many objects."""

    rows: Mapping[str, int]
    counts: tuple[int, ...]


def asked(scene: Scene, rng: np.random.Generator) -> Iterator[Asked]:
    """Everything that is asked about a scene, each task at least once."""
    side = scene.image_size
    yield Asked("caption", tasks.caption(), short(scene))
    for question, answer in questions(scene, rng):
        yield Asked("vqa", tasks.vqa(question), answer)
    for phrase, box in references(scene):
        yield Asked("refer", tasks.refer(phrase), format_box(box, side, side), box)
    for thing in scene.objects:
        yield Asked("identify", tasks.identify(thing.box, side, side), _name(thing))
    yield Asked("grounding", tasks.grounding(), _grounded(scene))
    words = [word for o in scene.objects for word in (o.shape, f"{o.color} {o.shape}")]
    phrase = words[rng.integers(len(words))]
    same = [o.box for o in scene.objects if phrase in f"{o.color} {o.shape}"]
    answer = f"<p>{phrase}</p> {format_boxes(same, side, side)}"
    yield Asked("detection", tasks.detection(phrase), answer)


def _name(thing: Object) -> str:
    return f"a {thing.size} {thing.color} {thing.shape}"


def _grounded(scene: Scene) -> str:
    """The short caption with boxes in the place of the places."""
    side = scene.image_size
    parts = [f"<p>{_name(o)}</p> {format_box(o.box, side, side)}" for o in scene.objects]
    ground = "stripes" if scene.background == "striped" else scene.background
    return f"{' and '.join(parts)} on {ground}"


def training_rows(
    scenes: Sequence[Scene], phases: Sequence[Phase], batch: int, seed: int = 0
) -> list[tuple[int, Asked]]:
    """(number of the scene, what is asked) in the order training takes them: a batch has one task, as
    a step of MiniGPT-v2's has one dataset, drawn so that a phase has its rows of each.

    Scenes are taken in turn, so that one comes again only after all others with as many objects.
    """
    order = random.Random(seed)
    left = {n: [i for i, s in enumerate(scenes) if len(s.objects) == n] for n in (1, 2, 3)}
    at = dict.fromkeys(left, 0)
    found: list[tuple[int, Asked]] = []
    for phase in phases:
        steps = [task for task, rows in phase.rows.items() for _ in range(rows // batch)]
        order.shuffle(steps)
        for step, task in enumerate(steps):
            count = phase.counts[step % len(phase.counts)]
            for _ in range(batch):
                i = left[count][at[count] % len(left[count])]
                rng = np.random.default_rng([seed, i, at[count]])
                at[count] += 1
                choices = [a for a in asked(scenes[i], rng) if a.task == task]
                found.append((i, choices[rng.integers(len(choices))]))
    return found
