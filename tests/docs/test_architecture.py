"""The picture of the imports in docs/reference/architecture.md is true."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.doc_blocks import blocks
from helpers.paths import ROOT

ENTRY_POINTS = ("__main__.py",)  # run by `python -m`: they start a command that lies higher up


def layers() -> dict[str, int]:
    """Package -> its line in the picture, counted from the top."""
    (picture,) = (
        b for b in blocks(ROOT / "docs/reference/architecture.md") if b.language == "text"
    )
    lines = [line[:40].split() for line in picture.text.splitlines()]
    return {name: number for number, names in enumerate(lines) for name in names}


def package(module: str) -> str:
    """minigpt4_jax.data.loader -> data, convert.build -> convert."""
    parts = module.split(".")
    return parts[0] if parts[0] == "convert" else ".".join(parts[1:2])


def imports(path: Path) -> Iterator[str]:
    """The packages of this project that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
            if node.module == "minigpt4_jax":
                modules = [f"minigpt4_jax.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (package(m) for m in modules if m.split(".")[0] in ("minigpt4_jax", "convert"))


LAYERS = layers()


@pytest.mark.parametrize("name", LAYERS)
def test_imports_go_down(name):
    folder = ROOT / name if name == "convert" else ROOT / "minigpt4_jax" / name
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    up = [
        f"{file.relative_to(ROOT)} imports {other}"
        for file in files
        if file.name not in ENTRY_POINTS
        for other in imports(file)
        if other != name and other in LAYERS and LAYERS[other] <= LAYERS[name]
    ]
    assert not up


def test_the_picture_has_every_package():
    folders = {p.parent.name for p in (ROOT / "minigpt4_jax").glob("*/__init__.py")}
    assert folders <= LAYERS.keys()
