"""What README.md and docs/ name exists, and their tables are complete."""

import dataclasses
import os
import pkgutil
import re

import pytest
from helpers.doc_blocks import PAGES
from helpers.paths import ROOT

from minigpt4_jax.data.config import DatasetConfig
from minigpt4_jax.training.config import TrainConfig


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_links_of_the_readme_exist() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert os.path.exists(ROOT / target), f"{page}: {target}"


def test_files_that_pages_name_exist() -> None:
    folders = "benchmarks|configs|deploy|examples|minigpt4_jax|tests"
    for page in PAGES:
        for name in re.findall(rf"`((?:{folders})/[\w/]+\.\w+)`", page.read_text()):
            assert (ROOT / name).exists(), f"{page}: {name}"


API_NAMES = [
    name
    for page in sorted((ROOT / "docs/reference/api").glob("*.md"))
    for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("name", API_NAMES)
def test_names_of_the_api_reference_exist(name: str) -> None:
    assert pkgutil.resolve_name(name) is not None


def test_the_configuration_page_lists_every_key_with_its_default() -> None:
    rows = re.findall(
        r"^\| `([\w.]+)` \| `(.*?)` \|",
        (ROOT / "docs/reference/configuration.md").read_text(),
        re.M,
    )
    flat = {"data.mix": {}}
    c = TrainConfig()
    for prefix, config in (("", c), ("lora.", c.lora), ("eval.", c.eval), ("data.", c.data)):
        values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        flat |= {
            prefix + key: v
            for key, v in values.items()
            if key not in ("data", "lora", "eval", "mix")
        }
    mixed = {f.name: getattr(DatasetConfig(), f.name) for f in dataclasses.fields(DatasetConfig)}
    assert dict(rows) == {key: repr(value) for key, value in (flat | mixed).items()}
