"""Every option that a command's --help lists is in the documentation."""

import contextlib
import io
import re
import sys

import pytest
from helpers.paths import ROOT

import convert.cli
from minigpt4_jax.cli import (
    batch,
    batch_merge,
    chat,
    check_data,
    curate,
    demo,
    evaluate_check,
    evaluate_compare,
    evaluate_report,
    evaluate_run,
    evaluate_score,
    serve,
)
from minigpt4_jax.cli import compile as compile_cli
from minigpt4_jax.data import tfds_build
from minigpt4_jax.demos import compare, quickstart, tiny_v2
from minigpt4_jax.shapes import dataset

CURATE = ("describe", "polish", "check", "review", "export", "captions", "shards")
CONVERT = ("build", "export", "merge", "unmerge", "pack", "inspect")
COMMANDS = {
    "demo": demo.main, "serve": serve.main,
    "chat": chat.main, "batch": batch.main, "batch merge": batch_merge.main,
    "check-data": check_data.main, "compile": compile_cli.main,
    "quickstart": quickstart.main, "tiny-v2": tiny_v2.main, "compare": compare.main,
    "tfds_build": tfds_build.main,
    "evaluate": evaluate_run.main, "evaluate check": evaluate_check.main,
    "evaluate score": evaluate_score.main, "evaluate compare": evaluate_compare.main,
    "evaluate report": evaluate_report.main,
}  # fmt: skip
# Commands that have guides of their own: their options are there, or in the list of commands.
GUIDES = {
    ("evaluation",): [name for name in COMMANDS if name.startswith("evaluate")],
    ("serving", "web-page"): ["serve", "demo"],
    ("curation",): CURATE,
}


def options(help_text: str) -> set[str]:
    return set(re.findall(r"^ +(?:-\w, )?(--[\w.-]+)", help_text, re.MULTILINE)) - {"--help"}


def documented(command: str) -> set[str]:
    """The options on the pages of a command."""
    pages = list((ROOT / "docs").rglob("*.md"))
    for guides, commands in GUIDES.items():
        if command in commands:
            pages = [ROOT / "docs" / "guides" / f"{guide}.md" for guide in guides]
            pages.append(ROOT / "docs" / "reference" / "commands.md")
    return set(re.findall(r"--[\w.-]*\w", " ".join(page.read_text() for page in pages)))


@pytest.mark.parametrize("command", [*COMMANDS, *CONVERT, *CURATE, "shapes"])
def test_options_are_documented(command, monkeypatch):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        if command == "shapes":  # reads sys.argv
            monkeypatch.setattr(sys, "argv", ["shapes", "--help"])
            dataset.main()
        elif command in CURATE:
            curate.main([command, "--help"])
        elif command in CONVERT:
            convert.cli.main([command, "--help"])
        else:
            COMMANDS[command](["--help"])
    found = options(out.getvalue())
    assert found and not sorted(found - documented(command))
