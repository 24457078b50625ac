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

from minigpt4_jax.processing import tasks
from minigpt4_jax.processing.boxes import Box, format_box, format_boxes
from minigpt4_jax.shapes.scene import Object, Scene
from minigpt4_jax.shapes.text import questions, references, short

SHORT = ("vqa", "refer", "identify")  # tasks with answers of a few words


class Asked(NamedTuple):
    """A question with its answer, and what it is about."""

    task: str
    question: str
    answer: str
    box: Box | None = None  # of the object that refer looks for, or identify names


class Phase(NamedTuple):
    """A stretch of training: how many questions of each task, of scenes with so many objects."""

    questions: Mapping[str, int]
    counts: tuple[int, ...]


def asked(scene: Scene, rng: np.random.Generator) -> Iterator[Asked]:
    """All questions about a scene, at least one for each task."""
    side = scene.image_size
    yield Asked("caption", tasks.caption(), short(scene))
    for question, answer in questions(scene, rng):
        yield Asked("vqa", tasks.vqa(question), answer)
    for phrase, box in references(scene):
        yield Asked("refer", tasks.refer(phrase), format_box(box, side, side), box)
    for thing in scene.objects:
        yield Asked("identify", tasks.identify(thing.box, side, side), _name(thing), thing.box)
    yield Asked("grounding", tasks.grounding(), _grounded(scene))
    words = [word for o in scene.objects for word in (o.shape, f"{o.color} {o.shape}")]
    phrase = words[rng.integers(len(words))]
    same = [o.box for o in scene.objects if phrase in f"{o.color} {o.shape}"]
    answer = f"<p>{phrase}</p> {format_boxes(same, side, side)}"
    yield Asked("detection", tasks.detection(phrase), answer)


def _name(thing: Object) -> str:
    return f"a {thing.size} {thing.color} {thing.shape}"


def _grounded(scene: Scene) -> str:
    """The short caption with boxes instead of places."""
    side = scene.image_size
    parts = [f"<p>{_name(o)}</p> {format_box(o.box, side, side)}" for o in scene.objects]
    ground = "stripes" if scene.background == "striped" else scene.background
    return f"{' and '.join(parts)} on {ground}"


def training_rows(
    scenes: Sequence[Scene], phases: Sequence[Phase], batch: int, turns: int = 1, seed: int = 0
) -> list[tuple[int, list[Asked]]]:
    """(number of the scene, what is asked of it in turn) in the order training takes them.

    A batch of rows asks for one long answer each, all of one task, or for `turns` short ones of any
    of SHORT, so that many share what the image costs. Scenes are taken in turn: one comes again only
    after all others with as many objects.
    """
    order = random.Random(seed)
    left = {n: [i for i, s in enumerate(scenes) if len(s.objects) == n] for n in (1, 2, 3)}
    at = dict.fromkeys(left, 0)
    found: list[tuple[int, list[Asked]]] = []
    for phase in phases:
        short = {task: n for task, n in phase.questions.items() if task in SHORT}
        steps: list[str | None] = [None] * (sum(short.values()) // (batch * turns))
        for long, number in phase.questions.items():
            steps += [long] * (number // batch if long not in SHORT else 0)
        order.shuffle(steps)
        for step, task in enumerate(steps):
            count = phase.counts[step % len(phase.counts)]
            for _ in range(batch):
                i = left[count][at[count] % len(left[count])]
                rng = np.random.default_rng([seed, i, at[count]])
                at[count] += 1
                everything = list(asked(scenes[i], rng))
                if task is None:
                    row = _short_questions(everything, short, turns, rng)
                else:
                    row = [_choose([a for a in everything if a.task == task], rng)]
                found.append((i, row))
    return found


def _short_questions(
    everything: list[Asked], weights: Mapping[str, int], turns: int, rng: np.random.Generator
) -> list[Asked]:
    """Up to `turns` questions, tasks drawn by weight, no object looked for or named twice: what was
    said of it before would answer the second question without a look at the image."""
    row: list[Asked] = []
    names, shares = list(weights), np.array(list(weights.values())) / sum(weights.values())
    for _ in range(turns):
        task = rng.choice(names, p=shares)
        boxes = [a.box for a in row if a.box is not None]
        candidates = [
            a for a in everything if a.task == task and a not in row and a.box not in boxes
        ]
        if candidates:
            row.append(_choose(candidates, rng))
    return row or [_choose([a for a in everything if a.task in weights], rng)]


def _choose(choices: list[Asked], rng: np.random.Generator) -> Asked:
    return choices[rng.integers(len(choices))]
