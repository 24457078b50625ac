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
from minigpt4_jax.shapes.scene import Scene
from minigpt4_jax.shapes.text import (
    background_name,
    object_name,
    questions,
    references,
    short_caption,
)

SHORT = ("vqa", "refer", "identify")  # tasks with answers of a few words


class TaskQuestion(NamedTuple):
    """A question of one of MiniGPT-v2's tasks, with its answer."""

    task: str
    question: str
    answer: str
    box: Box | None = None  # of the object that refer looks for or identify names


class Phase(NamedTuple):
    """A part of training."""

    questions: Mapping[str, int]  # task -> number of questions
    counts: tuple[int, ...]  # numbers of objects of the scenes, used in turn


def task_questions(scene: Scene, rng: np.random.Generator) -> Iterator[TaskQuestion]:
    """All questions about a scene, at least one of each task."""
    side = scene.image_size
    yield TaskQuestion("caption", tasks.caption(), short_caption(scene))
    for question, answer in questions(scene, rng):
        yield TaskQuestion("vqa", tasks.vqa(question), answer)
    for phrase, box in references(scene):
        yield TaskQuestion("refer", tasks.refer(phrase), format_box(box, side, side), box)
    for thing in scene.objects:
        yield TaskQuestion(
            "identify", tasks.identify(thing.box, side, side), f"a {object_name(thing)}", thing.box
        )
    yield TaskQuestion("grounding", tasks.grounding(), _grounded(scene))
    words = [word for o in scene.objects for word in (o.shape, f"{o.color} {o.shape}")]
    phrase = words[rng.integers(len(words))]
    same = [o.box for o in scene.objects if phrase in f"{o.color} {o.shape}"]
    answer = f"<p>{phrase}</p> {format_boxes(same, side, side)}"
    yield TaskQuestion("detection", tasks.detection(phrase), answer)


def _grounded(scene: Scene) -> str:
    """The short caption with boxes instead of places."""
    side = scene.image_size
    parts = [f"<p>a {object_name(o)}</p> {format_box(o.box, side, side)}" for o in scene.objects]
    return f"{' and '.join(parts)} on {background_name(scene)}"


def training_rows(
    scenes: Sequence[Scene], phases: Sequence[Phase], batch: int, turns: int = 1, seed: int = 0
) -> list[tuple[int, list[TaskQuestion]]]:
    """(index of a scene, the questions about it in one conversation) for each training row, in order.

    The rows of a batch have either one question with a long answer, all of one task, or up to `turns`
    questions of the tasks SHORT, which share the cost of the image. A scene is used again only after all
    others with the same number of objects.
    """
    order = random.Random(seed)
    by_count = {n: [i for i, s in enumerate(scenes) if len(s.objects) == n] for n in (1, 2, 3)}
    num_used = dict.fromkeys(by_count, 0)
    rows: list[tuple[int, list[TaskQuestion]]] = []
    for phase in phases:
        short = {task: n for task, n in phase.questions.items() if task in SHORT}
        steps: list[str | None] = [None] * (sum(short.values()) // (batch * turns))
        for task, number in phase.questions.items():
            steps += [task] * (number // batch if task not in SHORT else 0)
        order.shuffle(steps)
        for step, long_task in enumerate(steps):
            count = phase.counts[step % len(phase.counts)]
            for _ in range(batch):
                i = by_count[count][num_used[count] % len(by_count[count])]
                rng = np.random.default_rng([seed, i, num_used[count]])
                num_used[count] += 1
                candidates = list(task_questions(scenes[i], rng))
                if long_task is None:
                    row = _short_questions(candidates, short, turns, rng)
                else:
                    row = [_choose([c for c in candidates if c.task == long_task], rng)]
                rows.append((i, row))
    return rows


def _short_questions(
    questions: list[TaskQuestion], weights: Mapping[str, int], turns: int, rng: np.random.Generator
) -> list[TaskQuestion]:
    """Up to `turns` questions, of tasks drawn by weight. No object is looked for or named twice, because
    the first answer would give away the second."""
    row: list[TaskQuestion] = []
    names, shares = list(weights), np.array(list(weights.values())) / sum(weights.values())
    for _ in range(turns):
        task = rng.choice(names, p=shares)
        boxes = [q.box for q in row if q.box is not None]
        candidates = [
            q for q in questions if q.task == task and q not in row and q.box not in boxes
        ]
        if candidates:
            row.append(_choose(candidates, rng))
    return row or [_choose([q for q in questions if q.task in weights], rng)]


def _choose(choices: list[TaskQuestion], rng: np.random.Generator) -> TaskQuestion:
    return choices[rng.integers(len(choices))]
