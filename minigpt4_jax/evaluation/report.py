"""The report of results: one HTML file without anything outside of it, and a table in Markdown."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from minigpt4_jax.evaluation.report_curves import Curve
from minigpt4_jax.evaluation.report_rows import ShownRow, sample, show, worst
from minigpt4_jax.evaluation.results import number_text
from minigpt4_jax.storage.atomic import write_error, write_text_atomically

TEMPLATE = "evaluation_report.html"
SHOWN = 8  # worst rows, and random ones, of each benchmark
Scores = Mapping[str, Any]


class Confusion(NamedTuple):
    """Answers to questions with yes or no. name: of the file, if the benchmark has several.
    cells: label -> reading -> rows."""

    name: str
    readings: tuple[str, ...]
    cells: Mapping[str, Mapping[str, int]]


class Section(NamedTuple):
    """One benchmark in the report."""

    scores: Scores
    figures: list[tuple[str, str]]
    confusions: list[Confusion]
    worst: list[ShownRow]
    sample: list[ShownRow]
    has_boxes: bool  # drawn into pictures


def write_report(
    results: Sequence[Scores], folder: Path, *, curves: Sequence[Curve] = (), shown: int = SHOWN
) -> Path:
    """Write report.html and report.md into a folder; returns the HTML file.

    UserError: they cannot be written."""
    sections = [_section(scores, shown) for scores in results]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = (files("minigpt4_jax") / "assets" / TEMPLATE).read_text(encoding="utf-8")
    models = [str(scores["model"]) for scores in results if scores.get("model")]
    title = ", ".join(dict.fromkeys(models))
    html = environment.from_string(text).render(
        title=title or "results",
        sections=sections,
        curves=curves,
        published=published,
        rows_text=rows_text,
    )
    try:
        write_text_atomically(folder / "report.html", html, errors="replace")
        write_text_atomically(folder / "report.md", markdown(results), errors="replace")
    except OSError as e:
        raise write_error(folder, e) from None
    return folder / "report.html"


def markdown(results: Sequence[Scores]) -> str:
    """The table of all results in Markdown."""
    lines = [
        "| benchmark | metric | score | 95 % interval | rows | published |",
        "|---|---|---:|---:|---:|---|",
    ]
    for scores in results:
        low, high = scores["interval"]
        lines.append(
            f"| {scores['title']} | {scores['metric']} | {scores['score']:.2f} | {low:.2f} to {high:.2f} "
            f"| {rows_text(scores)} | {published(scores)} |"
        )
    return "\n".join(lines) + "\n"


def rows_text(scores: Scores) -> str:
    """ "100", or "100 of 4896" where only the first ones were asked."""
    rows, of_rows = scores["rows"], scores.get("of_rows", scores["rows"])
    return str(rows) if rows == of_rows else f"{rows} of {of_rows}"


def published(scores: Scores) -> str:
    """The published figures: "MiniGPT-v2 7B 88.69"."""
    return ", ".join(f"{p['model']} {p['score']:g}" for p in scores.get("published", ()))


def _section(scores: Scores, shown: int) -> Section:
    rows = scores["per_row"]
    better = scores.get("higher_is_better", True)
    chosen = worst(rows, shown, higher_is_better=better)
    return Section(
        scores, _figures(scores), _confusions(scores), [show(row) for row in chosen],
        [show(row) for row in sample(rows, shown)], any(row.get("true_box") for row in rows),
    )  # fmt: skip


def _figures(scores: Scores) -> list[tuple[str, str]]:
    """All figures but the headline, by the name of their group."""
    found = []
    for group in ("original", "official", "metrics", "files", "domains", "form"):
        for name, value in _flat(scores.get(group, {})):
            found.append((f"{group}: {name}", number_text(value)))
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping) and not name.startswith("per_"):
            found += _flat(value, f"{prefix}{name} ")
        elif isinstance(value, (int, float)):
            found.append((prefix + name, value))
    return found


def _confusions(scores: Scores) -> list[Confusion]:
    """A table for each file of the benchmark."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in scores["per_row"]:
        if "label" in row:
            groups.setdefault(row.get("group", ""), []).append(row)
    return [
        _confusion(name if len(groups) > 1 else "", of_group) for name, of_group in groups.items()
    ]


def _confusion(name: str, rows: Sequence[Mapping[str, Any]]) -> Confusion:
    readings = ("yes", "no") + (("neither",) if any(row["reading"] is None for row in rows) else ())
    cells = {label: dict.fromkeys(readings, 0) for label in ("yes", "no")}
    for row in rows:
        cells[row["label"]][row["reading"] or "neither"] += 1
    return Confusion(name, readings, cells)
