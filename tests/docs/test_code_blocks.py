"""The code blocks of README.md and docs/ work.

Python blocks and shell blocks run in a sandbox directory with tiny models and data under the names that the
pages use. The Python blocks of a page share one namespace, so a block may go on from an earlier one. Training
is cut to two steps and answers to eight tokens; a command that several pages show runs once. A block below
`<!-- not run: REASON -->` is only parsed: its commands exist and its options are known.
"""

import configparser
import contextlib
import dataclasses
import importlib
import io
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers import benchmark_layouts, released_files, tiny
from helpers.doc_blocks import PAGES, Block, blocks, commands
from helpers.paths import ROOT

import convert.cli
from minigpt4_jax.cli import batch, batch_merge, chat, check_data, curate, evaluate, serve, train
from minigpt4_jax.cli import compile as compile_cli
from minigpt4_jax.inference import loading
from minigpt4_jax.inference.model import Model
from minigpt4_jax.parallel import distributed
from minigpt4_jax.shapes.dataset import write_dataset
from minigpt4_jax.training.config_cli import parse as parse_config

LANGUAGES = {"sh", "python", "json", "text", "diff"}
SHORT = [
    "steps=2",
    "batch_size=2",
    "log_every=1",
    "eval_every=0",
    "sample_every=0",
    "dtype=float32",
]
# What the tiny checkpoints' shapes do not tell, and room for the prompts
SIZES = ["--set=vision.heads=2", "--set=llm.max_length=2048"]
QFORMER_SIZES = ["--set=qformer.heads=3"]
OTHER_PROGRAMS = {
    "cd", "docker", "export", "gcloud", "git", "mkdocs", "pip", "python3.11", "ray", "sbatch", "srun",
    "sudo", ".",
}  # fmt: skip


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Path:
    """A directory in which the paths that the pages name exist."""
    folder = tmp_path_factory.mktemp("sandbox")
    _write_models(folder)
    _write_data(folder)
    _write_released_files(folder)
    _write_benchmarks(folder)
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def _write_models(folder: Path) -> None:
    # One layer in each part but the Q-Former: programs of the unrolled layers are smaller.
    sizes = {
        "llm": dataclasses.replace(tiny.config().llm, layers=1),
        "vision": dataclasses.replace(tiny.config().vision, depth=1),
    }
    for name in (
        "models/minigpt4-7b",
        "runs/stage1/model",
        "runs/stage2/model",
        "quickstart/stage2/model",
    ):
        tiny.write_model(folder / name, **sizes)
    tiny.write_model(
        folder / "models/minigpt-v2", qformer=False, variant="minigpt-v2",
        prompt_template="[INST] {} [/INST] ", chat_template="minigptv2", end_symbol="</s>",
        **sizes,
    )  # fmt: skip


def _write_data(folder: Path) -> None:
    """photos/1.jpg ..., rows with them, a stage-2 folder, and one published dataset."""
    tiny.write_data(folder / "photos", rows=6)
    for n in range(6):
        (folder / "photos" / f"{n}.png").rename(folder / "photos" / f"{n}.jpg")
    (folder / "photos" / "rows.jsonl").unlink()
    rows = [{"image": f"photos/{n}.jpg", "caption": f"number {n}"} for n in range(6)]
    for name in ("my.jsonl", "held_out.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    colors = ("red", "green", "blue", "black")
    described = [
        {**row, "id": str(n), "caption": f"A {color} square fills the whole of picture {n}."}
        for n, (row, color) in enumerate(zip(rows, colors, strict=False))
    ]
    (folder / "polished.jsonl").write_text("".join(json.dumps(row) + "\n" for row in described))
    requests = [{"image": row["image"]} for row in rows[:2]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in requests))

    align = folder / "cc_sbu_align"
    shutil.copytree(folder / "photos", align / "image")
    annotations = [{"image_id": str(n), "caption": f"number {n}"} for n in range(6)]
    (align / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))

    vqa = folder / "DATA" / "vqav2"
    vqa.mkdir(parents=True)
    images = folder / "DATA" / "coco" / "images"
    images.mkdir(parents=True)
    shutil.copy(folder / "photos" / "1.jpg", images / "COCO_train2014_000000000001.jpg")
    row = {
        "image": "train2014/COCO_train2014_000000000001.jpg", "question": "What is it?",
        "answer": ["a square"], "question_id": 1,
    }  # fmt: skip
    for name in ("vqa_train.json", "vqa_val.json"):
        (vqa / name).write_text(json.dumps([row]))


def _write_benchmarks(folder: Path) -> None:
    """The benchmarks' files in EVAL, and answers of another model to POPE."""
    benchmark_layouts.write_all(folder / "EVAL")
    lines = [json.dumps({"id": n + 1, "answer": "No, there is not."}) for n in range(4)]
    (folder / "answers_of_another_model.jsonl").write_text("\n".join(lines))


def _write_released_files(folder: Path) -> None:
    """The files that `convert build` reads, under the names of the released ones."""
    files = folder / "files"
    files.mkdir()
    released_files.make_files(files)
    for name, source in {
        "eva_vit_g.pth": "eva.pth", "blip2_pretrained_flant5xxl.pth": "blip2.pth",
        "vicuna-7b-v0": "llm", "pretrained_minigpt4_7b.pth": "a.pth",
    }.items():  # fmt: skip
        (files / source).rename(folder / name)
    shutil.rmtree(files)


@pytest.fixture(scope="module")
def done() -> set[str]:
    """Shell commands that have run in the sandbox."""
    return set()


@pytest.fixture(scope="module")
def load_once() -> Iterator[None]:
    """A model directory that has not changed is loaded, and its programs traced, once."""
    loaded: dict[object, Model] = {}
    load = loading.load

    def load_or_reuse(model_dir: str | Path, *args: object, **options: object) -> Model:
        changed = max(path.stat().st_mtime_ns for path in Path(model_dir).iterdir())
        key = (str(model_dir), changed, args, tuple(sorted(options.items())))
        if key not in loaded:
            loaded[key] = load(model_dir, *args, **options)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load", load_or_reuse)
        yield


# --- running ------------------------------------------------------------------------------------------


def run_python_module(module: str, args: Sequence[str]) -> None:
    """Run `python -m module args` in this process; AssertionError if it does not succeed."""
    runners: dict[str, Callable[[list[str]], object]] = {
        "convert": _convert,
        "minigpt4_jax.batch": _batch,
        "minigpt4_jax.curate": _curate,
        "minigpt4_jax.chat": lambda args: chat.main([*args, "--max_new_tokens=8"]),
        "minigpt4_jax.data": check_data.main,
        "minigpt4_jax.evaluate": evaluate.main,
        "minigpt4_jax.shapes": _draw_shapes,
        "minigpt4_jax.train": _train,
    }
    assert runners[module](list(args)) in (0, None)


def _batch(args: list[str]) -> int:
    return batch.main(args if args[0] == "merge" else [*args, "--max_new_tokens=8"])


def _draw_shapes(args: list[str]) -> None:
    write_dataset(option(args, "--out"), train=0, heldout=1, heldout_pairs=1, progress=False)


def _convert(args: list[str]) -> None:
    _remove(option(args, "--out"))
    if args[0] == "build":
        args = [*args, *SIZES, *(QFORMER_SIZES if option(args, "--qformer") else [])]
    convert.cli.main(args)


def _curate(args: list[str]) -> int:
    _remove(option(args, "--out"))
    return curate.main([*args, *(["--max_new_tokens=8"] if args[0] == "describe" else [])])


def _train(args: list[str]) -> int:
    _remove(option(args, "--workdir"))
    return train.main([*args, *(f"--config.{setting}" for setting in SHORT)])


def option(args: Sequence[str], name: str) -> str:
    """The value of `name=value`, "" if it is not given."""
    values = [arg.partition("=")[2] for arg in args if arg.partition("=")[0] == name]
    return values[-1] if values else ""


def _remove(path: str) -> None:
    """Remove what an earlier block wrote there."""
    if path and os.path.isdir(path):
        shutil.rmtree(path)
    elif path and os.path.exists(path):
        os.remove(path)


def run_shell(block: Block, done: set[str]) -> None:
    for command in commands(block):
        if str(command) in done:
            continue
        done.add(str(command))
        if command[:2] == ["python", "-m"]:
            run_python_module(command[2], command[3:])
        elif command[:2] == ["python", "-c"]:
            exec(command[2], {})
        elif command[0] == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", command[1:])
                runpy.run_path(command[1], run_name="__main__")
        else:
            raise AssertionError(
                f"{block}: {command[0]} cannot be run here: mark the block `not run`"
            )


def run(block: Block, names: dict[str, object], done: set[str]) -> None:
    """Run one block. names: what the page's earlier Python blocks defined. done: commands that ran before."""
    if block.title:
        Path(block.title).write_text(block.text)
    if block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)
    elif block.language == "python":
        exec(compile(block.text, str(block), "exec"), names)
    elif block.language == "sh":
        run_shell(block, done)


RUN = [
    p
    for p in PAGES
    if any(b.language in ("python", "sh", "json") and not b.not_run for b in blocks(p))
]


@pytest.mark.parametrize("page", RUN, ids=lambda p: p.stem)
def test_blocks_run(
    page: Path, sandbox: Path, done: set[str], load_once: None, monkeypatch
) -> None:
    monkeypatch.chdir(sandbox)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run:
            continue
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output):
                run(block, names, done)
        except BaseException as e:
            e.add_note(f"in the {block.language} block {block.page.relative_to(ROOT)}:{block.line}")
            raise


# --- parsing ------------------------------------------------------------------------------------------


def check_command(command: list[str]) -> None:
    """AssertionError or UserError for a program, target, module or option that does not exist."""
    program, *rest = command
    if "python -m" in " ".join(rest):  # a command for other hosts, as with srun and gcloud
        inner = " ".join(rest).partition("python -m ")[2].split()
        check_module(inner[0], inner[1:])
    if program == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for target in rest:
            assert "=" in target or target in targets, f"make {target}"
    elif program == "python" and rest[0] == "-m":
        check_module(rest[1], rest[2:])
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], "-c", "exec")
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), rest[0]
    else:
        assert program in OTHER_PROGRAMS, program
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(rest)):
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert extra in setup["options.extras_require"], extra


def check_module(module: str, args: list[str]) -> None:
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    if module == "minigpt4_jax.train":
        _, args = distributed.parse_process_options(args)
        parse_config(args, data_only=True)
    elif module == "minigpt4_jax.chat":
        chat.parse(args)
    elif module == "minigpt4_jax.batch":
        batch_merge.parse(args[1:]) if args[0] == "merge" else batch.parse(args)
    elif module == "minigpt4_jax.serve":
        serve.parse(args)
    elif module == "minigpt4_jax.compile":
        _, rest = compile_cli._parser().parse_known_args(args)
        parse_config(
            [*([] if "--config" in " ".join(rest) else ["--config=stage2"]), *rest], sizes_only=True
        )
    elif module == "minigpt4_jax.curate":
        importlib.import_module(curate.COMMANDS[args[0]].module).parse(args[1:])
    elif module == "convert":
        convert.cli._parser().parse_args(args)


NOT_RUN = [b for p in PAGES for b in blocks(p) if b.not_run]


@pytest.mark.parametrize("block", NOT_RUN, ids=str)
def test_marked_blocks_parse(block: Block) -> None:
    assert block.language in ("sh", "python"), f"{block}: nothing to mark as not run"
    if block.language == "python":
        compile(block.text, str(block), "exec")
        return
    for command in commands(block):
        check_command(command)


def all_blocks() -> Iterator[Block]:
    return (block for page in PAGES for block in blocks(page))


def test_every_block_names_a_known_language() -> None:
    assert {block.language for block in all_blocks()} <= LANGUAGES


def test_the_comment_is_spelled_as_the_test_reads_it() -> None:
    for page in PAGES:
        comments = re.findall(r"^ *<!--", page.read_text(), re.MULTILINE)
        marked = [block for block in blocks(page) if block.not_run]
        assert len(comments) == len(marked), f"{page}: a comment that marks no block"
