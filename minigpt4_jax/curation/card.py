"""The data card of an exported dataset: how many rows, made how, from what."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from minigpt4_jax import __version__
from minigpt4_jax.curation.rows import Row

CARD_FILE = "card.json"  # the same for programs
README_FILE = "README.md"
HASHES_FILE = "SHA256SUMS"

# How the dataset is read, by format
USAGE = {
    "minigpt4": "python -m minigpt4_jax.train --config=stage2 --config.data.path=DIR ...",
    "jsonl": "python -m minigpt4_jax.train --config=stage2 --config.data.path=DIR/rows.jsonl ...",
    "webdataset": "python -m minigpt4_jax.train --config=DIR/stage2_config.py ...",
    "parquet": "python -m minigpt4_jax.train --config=stage2 --config.data.path=DIR ...",
}


def make_card(
    format_name: str,
    counts: Mapping[str, int],
    removed: Mapping[str, int],
    statistics: Mapping[str, Any],
    steps: Sequence[Row],
) -> dict[str, Any]:
    """steps: settings of the steps that made the rows, the first one first."""
    return {
        "format": format_name,
        "version": __version__,
        "counts": dict(counts),
        "removed": _all_removed(steps, removed),
        "statistics": dict(statistics),
        "steps": list(steps),
    }


def _all_removed(steps: Sequence[Row], last: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """Removed rows by step and cause."""
    removed = {
        step["command"]: step["removed"] for step in steps if isinstance(step.get("removed"), dict)
    }
    return {**removed, "export": dict(last)}


def readme(card: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    lines = [
        "# Data card",
        "",
        f"Written by `minigpt4 curate export`, version {card['version']}.",
        "",
    ]
    lines += ["| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in card["counts"].items()]
    lines += ["", "Read it with", "", "```sh", USAGE[card["format"]], "```", ""]
    lines += ["## How it was made", ""]
    if not card["steps"]:
        lines += ["The steps before the export left no record.", ""]
    for number, step in enumerate(card["steps"], 1):
        lines += [f"{number}. `{step.get('command', 'unknown')}`", ""]
        lines += [
            f"    - {name}: {_cell(value)}"
            for name, value in step.items()
            if name not in ("command", "statistics", "removed") and value not in (None, [], "")
        ]
        lines += [""]
    lines += ["## Removed rows", "", "| step | cause | rows |", "|---|---|---|"]
    lines += [
        f"| {step} | {cause} | {count} |"
        for step, causes in card["removed"].items()
        for cause, count in causes.items()
    ]
    lines += ["", "## Numbers", "", "```json", json.dumps(card["statistics"], indent=1), "```", ""]
    lines += [f"The hash of every file is in {HASHES_FILE}: `sha256sum --check {HASHES_FILE}`.", ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split()).replace("|", "\\|")


def hashes(files: Mapping[str, str]) -> str:
    """As sha256sum writes them."""
    return "".join(f"{files[name]}  {name}\n" for name in sorted(files))
