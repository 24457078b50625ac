"""Scores over the checkpoints of a run, as curves of a report."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WIDTH, HEIGHT = 420, 160
MARGIN, TOP = 34, 50  # TOP: below the title and the highest label
PREFIX = "eval/"  # of the keys in a run's metrics.jsonl


class Curve(NamedTuple):
    """points: (step, score), by step. svg: the coordinates of a polyline, "x,y x,y"."""

    title: str
    points: list[tuple[float, float]]

    @property
    def svg(self) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.places)

    @property
    def places(self) -> list[tuple[float, float]]:
        """Of the points, in a picture of WIDTH x HEIGHT pixels."""
        steps = [step for step, _ in self.points]
        scores = [score for _, score in self.points]
        wide, high = max(steps) - min(steps) or 1.0, max(scores) - min(scores) or 1.0
        return [
            (
                MARGIN + (step - min(steps)) / wide * (WIDTH - 2 * MARGIN),
                HEIGHT - MARGIN - (score - min(scores)) / high * (HEIGHT - MARGIN - TOP),
            )
            for step, score in self.points
        ]


def curves_of_run(workdir: Path) -> list[Curve]:
    """The scores that a training run wrote to its metrics.jsonl; none without that file."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    path = workdir / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # cut by a kill
            continue
        for key, value in record.items():
            if key.startswith(PREFIX) and isinstance(value, (int, float)):
                points[key.removeprefix(PREFIX)].append((float(record["step"]), float(value)))
    return [Curve(title, sorted(found)) for title, found in points.items()]


def curves_of_results(folders: Mapping[Path, Sequence[Mapping[str, Any]]]) -> list[Curve]:
    """A curve for each benchmark over results folders. The step is the last number in a folder's name, or
    its place in the list where a name has none."""
    steps = [re.findall(r"\d+", folder.name) for folder in folders]
    numbered = all(steps)
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for place, (found, results) in enumerate(zip(steps, folders.values(), strict=True)):
        for scores in results:
            step = float(found[-1]) if numbered else float(place)
            points[scores["title"]].append((step, float(scores["score"])))
    return [Curve(title, sorted(found)) for title, found in points.items() if len(found) > 1]
