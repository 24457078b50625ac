"""From images to a training run, killed on the way: the same dataset, and nothing paid for twice."""

import json
import os

import numpy as np
import pytest
from helpers import tiny
from helpers.openai_server import CountingServer
from PIL import Image

import minigpt4_jax
from minigpt4_jax.cli import batch_output, common, curate, train
from minigpt4_jax.curation.answers import AnswerCache
from minigpt4_jax.storage import atomic

NUM_IMAGES = 6
SHORT = (
    "steps=2",
    "batch_size=2",
    "log_every=1",
    "eval_every=0",
    "sample_every=0",
    "dtype=float32",
)


class Killed(BaseException):
    """Ends a run where a kill might."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curate")
    tiny.write_random_model(folder / "model", llm_layers=1)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for n in range(NUM_IMAGES):
        pixels = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((80, 64), Image.Resampling.BICUBIC)
        image.save(folder / "images" / f"{n}.jpg")
    return folder


@pytest.fixture(scope="module")
def model(home):
    return minigpt4_jax.load(home / "model", "float32")


@pytest.fixture(autouse=True)
def one_model(monkeypatch, model):
    monkeypatch.setattr(common, "load_model", lambda args: model)


def polished(text):
    """A text that passes the filters, and another one for each text."""
    words = ["red", "green", "blue", "old", "new", "large", "small", "round"]
    number = sum(map(ord, text))
    some = [words[(number // 8**k) % 8] for k in range(4)]
    house = f"a {some[0]} {some[1]} house with a {some[2]} door"
    return f"This is {house} and the {some[3]} roof of a barn, number {number}."


def commands(home, work, url):
    """The commands of a whole curation."""
    described, polished_file, checked = (work / f"{name}.jsonl" for name in ("d", "p", "c"))
    return [
        ["describe", f"--model={home / 'model'}", f"--images={home / 'images'}", f"--output={described}",
         "--max_new_tokens=7", "--continue-below=11", "--prompt=what is it", "--batch_size=4"],
        ["polish", f"--input={described}", f"--output={polished_file}", f"--endpoint={url}",
         "--concurrency=2"],
        ["check", f"--input={polished_file}", f"--output={checked}", f"--before={described}",
         "--samples=2"],
        ["export", f"--input={checked}", f"--out={work / 'out'}", "--overwrite"],
    ]  # fmt: skip


def run_all(home, work, url):
    for command in commands(home, work, url):
        assert curate.main(command) == 0, command


def contents(work):
    """What a curation leaves, by file name."""
    files = {}
    for path in sorted(work.rglob("*")):
        if path.is_file() and path.suffix != ".sqlite":
            files[path.relative_to(work).as_posix()] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def undisturbed(home, model, tmp_path_factory):
    """The folder of a curation without a kill, and the server's address, which is in its records."""
    work = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch, CountingServer(polished) as server:
        patch.setattr(common, "load_model", lambda args: model)
        run_all(home, work, server.url)
    return work


def without_address(files):
    """Numbers of a run and of its server's port differ; everything else may not."""
    result = {}
    for name, data in files.items():
        if name.endswith((".settings.json", "card.json", "README.md", "SHA256SUMS")):
            continue
        result[name] = data
    return result


class Kills:
    """Raises Killed at the n-th of the moments at which something is written."""

    def __init__(self, patch, at):
        self.at, self.moments = at, 0
        for owner, name in (
            (AnswerCache, "put"), (batch_output.Output, "_write_pending"), (os, "replace"),
            (atomic.AtomicDirectory, "publish"),
        ):  # fmt: skip
            patch.setattr(owner, name, self._around(getattr(owner, name)))

    def _around(self, function):
        def wrapped(*args, **kwargs):
            self._moment()
            result = function(*args, **kwargs)
            self._moment()
            return result

        return wrapped

    def _moment(self):
        self.moments += 1
        if self.moments >= self.at:  # a dead process writes nothing more
            raise Killed


@pytest.mark.parametrize("first", (1, 2, 3))
def test_kills_change_nothing(home, undisturbed, tmp_path, first):
    """Each run goes on from the last kill, and is killed three writes later than the one before."""
    kills = 0
    with CountingServer(polished) as server:
        while True:
            with pytest.MonkeyPatch.context() as patch:
                Kills(patch, first + 3 * kills)
                try:
                    run_all(home, tmp_path, server.url)
                    break
                except Killed:
                    kills += 1
        assert kills >= 6
        assert set(server.charged.values()) == {1}
        lines = (tmp_path / "d.jsonl").read_text().splitlines()
        assert server.asked.keys() == {json.loads(line)["caption"] for line in lines}
    assert without_address(contents(tmp_path)) == without_address(contents(undisturbed))


def test_the_export_trains(home, undisturbed, tmp_path):
    rows = json.loads((undisturbed / "out" / "filter_cap.json").read_text())["annotations"]
    assert len(rows) == NUM_IMAGES
    arguments = [
        "--config=stage2", f"--workdir={tmp_path / 'run'}", f"--config.model={home / 'model'}",
        f"--config.data.path={undisturbed / 'out'}", *(f"--config.{setting}" for setting in SHORT),
    ]  # fmt: skip
    assert train.main(arguments) == 0
    metrics = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2]


def test_the_card_names_every_step(undisturbed):
    card = json.loads((undisturbed / "out" / "card.json").read_text())
    describe, polish, check, export = card["steps"]
    assert describe["prompt"] == "what is it" and describe["seed"] is not None
    assert len(describe["model_fingerprint"]) == 16
    assert polish["instruction"].startswith("You edit") and polish["temperature"] == 0.7
    assert check["command"] == "check" and export["command"] == "export"


def test_a_local_model_polishes_once(home, undisturbed, tmp_path, capsys, monkeypatch):
    """Random weights write no good texts: what is asked, kept and asked again is what counts."""
    out = tmp_path / "p.jsonl"
    arguments = [
        "polish", f"--model={home / 'model'}", f"--input={undisturbed / 'd.jsonl'}", f"--output={out}",
        "--max-tokens=5", "--batch_size=4",
    ]  # fmt: skip
    put, stored = AnswerCache.put, []

    def killed_put(self, *args):
        if len(stored) == 2:
            raise Killed
        put(self, *args)
        stored.append(args[0])

    monkeypatch.setattr(AnswerCache, "put", killed_put)
    with pytest.raises(Killed):
        curate.main(arguments)
    monkeypatch.setattr(AnswerCache, "put", put)
    assert curate.main(arguments) == 0
    texts = {
        json.loads(line)["caption"] for line in (undisturbed / "d.jsonl").read_text().splitlines()
    }
    assert f"{len(texts) - 2} texts asked, 2 answered before" in capsys.readouterr().out
    first = (tmp_path / "p.removed.jsonl").read_bytes()
    assert (
        curate.main([*arguments[:4], *arguments[4:], f"--cache={tmp_path / 'other.sqlite'}"]) == 0
    )
    assert (tmp_path / "p.removed.jsonl").read_bytes() == first  # a text's seed is its own
    capsys.readouterr()
    assert curate.main([*arguments, "--seed=1"]) == 0
    assert f"{len(texts)} texts asked" in capsys.readouterr().out
