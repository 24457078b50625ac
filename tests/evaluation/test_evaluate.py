"""python -m minigpt4_jax.evaluate: every benchmark from its files to scores, killed and continued."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import benchmark_layouts, tiny

import minigpt4_jax
from minigpt4_jax.cli import evaluate
from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation import answering
from minigpt4_jax.evaluation.benchmarks import BENCHMARKS, find
from minigpt4_jax.evaluation.metrics import meteor
from minigpt4_jax.evaluation.ranking import rank_rows
from minigpt4_jax.processing.chat_templates import chat_format, with_images
from minigpt4_jax.shapes.dataset import write_dataset

NAMES = [name for name in BENCHMARKS if not name.startswith("shapes")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.write_random_model(
        folder / "model", qformer=False, chat_template="minigptv2", llm_layers=1
    )
    benchmark_layouts.write_all(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def without_meteor(monkeypatch):
    monkeypatch.setattr(meteor, "missing", lambda: "METEOR is left out here")


def options(home, out, names, *more):
    return [f"--model={home / 'model'}", f"--data.root={home / 'data'}", f"--benchmark={','.join(names)}",
            f"--out={out}", "--batch=4", *more]  # fmt: skip


def answers_of(out):
    """Task -> its lines by row and round."""
    found = {}
    for path in out.glob("*/answers*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            lines = found.setdefault(path.parent.name, {})
            key = (line["n"], line.get("round", 0))
            assert key not in lines, f"{path} has row {key} twice"
            lines[key] = {k: v for k, v in line.items() if k not in ("n", "round")}
    return found


def scores_of(out):
    return {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/scores.json")}


@pytest.fixture(scope="module")
def whole_run(home):
    """All benchmarks in one loading of the model, without an interruption."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meteor, "missing", lambda: "METEOR is left out here")
        assert evaluate.main(options(home, home / "whole", NAMES)) == 0
    return home / "whole"


def test_every_benchmark_is_answered_and_scored(whole_run):
    scores, answers = scores_of(whole_run), answers_of(whole_run)
    tasks = {f"{name}_{split}" if split else name
             for name in NAMES for split in find(name).splits or ("",)}  # fmt: skip
    assert scores.keys() == answers.keys() == tasks
    for name, of_task in scores.items():
        count = {"iconvqa": 11, "pope": 12}.get(name, benchmark_layouts.COUNT)
        assert len(answers[name]) == of_task["rows"] == len(of_task["per_row"]) == count
        assert of_task["interval"][0] <= of_task["interval"][1]
        assert not of_task["errors"]
    assert scores["refcoco_val"]["published"][0]["score"] == 88.69


def test_answers_are_those_of_generate(home, whole_run):
    model = minigpt4_jax.load(home / "model", exif=False)
    chat = chat_format(model.config, model.tokenizer)
    rows = find("okvqa").read(home / "data" / "okvqa", "")
    prompts = [chat.render([(with_images(row.question, 1), None)]) for row in rows]
    images = [home / "data" / row.images[1] for row in rows]
    want = model.generate(images, prompts, max_new_tokens=20)
    assert [answers_of(whole_run)["okvqa"][n, 0]["answer"] for n in range(len(rows))] == want


def test_images_are_used_as_they_are_stored_and_that_is_recorded(whole_run):
    settings = json.loads((whole_run / "okvqa" / "answers.settings.json").read_text())
    assert settings["exif"] is False


def test_a_killed_run_continues_without_loss_or_repetition(home, whole_run):
    out = home / "killed"
    command = [
        sys.executable,
        "-m",
        "minigpt4_jax.evaluate",
        *options(home, out, ["gqa", "hm", "vsr", "pope"]),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not list(out.glob("hm/answers.jsonl")) and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert not (out / "vsr" / "scores.json").exists()
    with (out / "gqa" / "answers.jsonl").open("ab") as file:
        file.write(b'{"n": 0, "id": 0, "ans')  # a line that a kill cut
    assert evaluate.main(options(home, out, ["gqa", "hm", "vsr", "pope"])) == 0
    want = {name: lines for name, lines in answers_of(whole_run).items() if name in answers_of(out)}
    assert answers_of(out) == want
    scores = scores_of(whole_run)
    assert {name: of["score"] for name, of in scores_of(out).items()} == {
        name: scores[name]["score"] for name in want
    }


def test_every_benchmark_continues_after_an_exception(home, whole_run, monkeypatch):
    """Stopped after each row of every task in turn: nothing is lost, nothing is asked twice."""
    out = home / "stopped"
    add, answered = answering.AnswerFile.add, []

    def add_one_and_stop(self, n, values, round=0):
        add(self, n, values, round)
        answered.append((self._path.parent.name, n))
        if len(answered) % 31 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(answering.AnswerFile, "add", add_one_and_stop)
    model = minigpt4_jax.load(home / "model", exif=False)
    monkeypatch.setattr("minigpt4_jax.cli.common.load_model", lambda args: model)
    for _ in range(40):
        try:
            evaluate.main(options(home, out, NAMES))
            break
        except KeyboardInterrupt:
            continue
    assert answers_of(out) == answers_of(whole_run)
    repeated = [row for row in answered if answered.count(row) > 1]
    assert not repeated


def test_the_generated_dataset_is_a_benchmark_too(home):
    write_dataset(
        home / "shapes_root" / "shapes", train=0, heldout=2, heldout_pairs=0, progress=False
    )
    command = options(home, home / "shapes", ["shapes", "shapes_description"], "--limit=2")
    command += [f"--data.root={home / 'shapes_root'}", "--split=heldout"]
    assert evaluate.main(command) == 0
    assert set(scores_of(home / "shapes")) == {"shapes_heldout", "shapes_description_heldout"}


def test_nothing_is_loaded_when_everything_is_answered(home, whole_run, monkeypatch):
    monkeypatch.setattr("minigpt4_jax.cli.common.load_model", lambda args: pytest.fail("loaded"))
    before = scores_of(whole_run)
    assert evaluate.main(options(home, whole_run, NAMES)) == 0
    assert scores_of(whole_run) == before


def test_other_options_do_not_continue_a_run(home, whole_run):
    tiny.write_model(home / "other", qformer=False, chat_template="minigptv2", llm_layers=1)
    for more, message in {
        "--template=vicuna0": "was started with template None, now vicuna0",
        "--no-extra-bos": "was started with extra_bos True, now False",
        f"--model={home / 'other'}": "was started with weights",
    }.items():
        with pytest.raises(UserError, match=message):
            evaluate.main(options(home, whole_run, ["gqa"], more))


def test_resampling_follows_the_rounds_of_the_original(home):
    out = home / "resampled"
    evaluate.main(
        options(home, out, ["refcoco", "gqa"], "--split=testB", "--resample", "--limit=2")
    )
    lines = answers_of(out)["refcoco_testB"]
    # a random model never answers with a box: the question and five rounds
    assert sorted(lines) == [(n, round) for n in range(2) for round in range(6)]
    scores = scores_of(out)["refcoco_testB"]
    assert [row["accepted_in_round"] for row in scores["per_row"]] == [5, 5]
    assert {"resample", "no_resample"} <= set(scores["original"])
    assert scores["form"]["box_errors"] == 1
    assert len(answers_of(out)["gqa"]) == 2  # other questions are asked once


def test_shards_share_the_rows(home, whole_run, capsys):
    out = home / "shards"
    names = ["gqa", "iconvqa"]
    evaluate.main(options(home, out, names, "--shard=1/2"))
    assert "other processes still have rows" in capsys.readouterr().out
    evaluate.main(options(home, out, names, "--shard=0/2"))
    want = {name: scores_of(whole_run)[name]["score"] for name in names}
    assert {name: of["score"] for name, of in scores_of(out).items()} == want
    assert (
        sum(1 for _ in (out / "gqa" / "answers-1-of-2.jsonl").open())
        == benchmark_layouts.COUNT // 2
    )


def test_a_broken_image_is_counted_and_named(home, tmp_path, capsys):
    data = benchmark_layouts.write_all(tmp_path / "data")
    (data / "gqa/images/1.jpg").write_bytes(b"no image")
    (data / "gqa/images/2.jpg").unlink()
    (data / "iconvqa/choose_txt/val/1/image.png").write_bytes(b"no image")
    command = [f"--model={home / 'model'}", f"--data.root={data}", "--benchmark=gqa,iconvqa",
               f"--out={tmp_path / 'out'}"]  # fmt: skip
    assert evaluate.main(command) == 1
    scores = scores_of(tmp_path / "out")
    assert [error["id"] for error in scores["gqa"]["errors"]] == [1, 2]
    assert [error["id"] for error in scores["iconvqa"]["errors"]] == [1, 5, 9]
    assert "1.jpg" in capsys.readouterr().out
    benchmark_layouts.gqa(benchmark_layouts.Root(data))
    evaluate.main([*command, "--retry-errors"])
    assert not scores_of(tmp_path / "out")["gqa"]["errors"]


def test_ranking_is_that_of_the_original_and_of_the_mean_loss(home):
    model = minigpt4_jax.load(home / "model", exif=False)
    rows = find("iconvqa").read(home / "data" / "iconvqa", "")[:10]
    images = [home / "data" / row.images[0] for row in rows]
    ranked = rank_rows(model, rows, images)
    padded = [[*row.candidates, *["none"] * (3 - len(row.candidates))] for row in rows]
    want = model.multi_select(
        images, [row.question for row in rows], [list(column) for column in zip(*padded, strict=True)],
        counts=[len(row.candidates) for row in rows], template=True,
    )  # fmt: skip
    for row, of_row, ranking in zip(rows, ranked, want, strict=True):
        assert list(np.argsort(of_row["losses"], kind="stable")) == ranking[: len(row.candidates)]
    nll, tokens = model.score(
        [images[0]] * 2, [rows[0].question] * 2, list(rows[0].candidates), template=True
    )
    assert ranked[0]["mean_losses"] == pytest.approx(list(nll / tokens), rel=1e-5)


def test_check_says_what_is_missing(home, tmp_path, capsys):
    assert (
        evaluate.main(["check", f"--data.root={home / 'data'}", f"--benchmark={','.join(NAMES)}"])
        == 0
    )
    out = capsys.readouterr().out
    assert "ok      refcoco_testA: 4 rows, 4 images" in out
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "images").mkdir()
    assert evaluate.main(["check", f"--data.root={tmp_path}", "--benchmark=gqa,pope"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"MISSING gqa: missing: .*testdev_balanced_questions.json .*from https", out)
    assert out.count("MISSING pope") == 4
    benchmark_layouts.gqa(benchmark_layouts.Root(tmp_path))
    (tmp_path / "gqa/images/0.jpg").unlink()
    evaluate.main(["check", f"--data.root={tmp_path}", "--benchmark=gqa"])
    assert "1 of 4 images are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.root=/nowhere", "no such directory"),
        ("--benchmark=refcoco,pop", "did you mean pope"),
        ("--split=train", "none of them, but val, testA, testB"),
        ("--limit=0", "--limit=0: expected 1 or more"),
        ("--shard=2/2", "expected I/N"),
    ],
)
def test_mistakes_are_one_line(home, tmp_path, option, message):
    with pytest.raises(UserError, match=message):
        evaluate.main([*options(home, tmp_path, ["refcoco"]), option])


def test_wrong_folder_says_what_belongs_there(home, tmp_path):
    with pytest.raises(UserError, match=r"gqa needs testdev_balanced_questions\.json"):
        evaluate.main([*options(home, tmp_path / "out", ["gqa"]), f"--data.root={tmp_path}"])
    assert not (tmp_path / "out").exists()
