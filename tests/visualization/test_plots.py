"""The contact sheet and the loss plot: drawn, coloured, and tolerant of what training logs hold."""

import json

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.errors import UserError
from minigpt4_jax.visualization import plots


def test_contact_sheet_marks_right_and_wrong(tmp_path):
    blank = np.full((20, 30, 3), 255, np.uint8)
    Image.fromarray(blank).save(tmp_path / "one.png")
    path = plots.contact_sheet(
        [blank, Image.fromarray(blank).convert("L"), tmp_path / "one.png"],
        ["a red circle", "x" * 400, ""],
        [True, False, None],
        tmp_path / "out" / "sheet.png",
        truths=["a", "b " * 200, "c"],
        title="Stage 1",
        columns=3,
    )
    sheet = np.asarray(Image.open(path))
    found = [tuple(sheet[120, x]) for x in range(sheet.shape[1])]
    places = [found.index(color) for color in (plots._RIGHT, plots._WRONG, plots._NEUTRAL)]
    assert places == sorted(places)


def test_contact_sheet_wants_one_of_each(tmp_path):
    blank = np.zeros((8, 8, 3), np.uint8)
    for images, captions, right in (([blank], [], [True]), ([], [], []), ([blank], ["a"], [])):
        with pytest.raises(UserError, match="contact sheet"):
            plots.contact_sheet(images, captions, right, tmp_path / "x.png")
    with pytest.raises(UserError, match=r"none\.png"):
        plots.contact_sheet([tmp_path / "none.png"], ["a"], [None], tmp_path / "x.png")
    with pytest.raises(UserError, match="cannot write"):
        plots.contact_sheet([blank], ["a"], [None], tmp_path)
    assert not (tmp_path / "x.png").exists()


def test_loss_plot_of_runs_and_files(tmp_path):
    log = tmp_path / "log.jsonl"
    rows = [{"step": i, "loss": 3 / (i + 1), "lr": 0.1} for i in range(90)]
    rows += [{"step": 50, "val_loss": 0.2}, {"step": 90, "text": "a caption"}]
    rows += [{"step": 91, "loss": None}, {"loss": 2.0}, {"step": 3, "loss": float("nan")}]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '[1]\n{"step": 92, "lo')
    train, validation = plots._curves(log)
    assert train.shape == (90, 2) and validation.tolist() == [[50, 0.2]]
    for runs in (log, rows, {"stage 1": log, "stage 2": rows[:1], "stage 3": []}):
        path = plots.loss_plot(runs, tmp_path / "new" / "loss.png")
        assert Image.open(path).size[0] > 800
        path.unlink()


def test_a_step_logged_again_counts_once():
    train, _ = plots._curves([{"step": s, "loss": v} for s, v in ((1, 5), (2, 4), (3, 3), (2, 9))])
    assert train.tolist() == [[1, 5], [2, 9], [3, 3]]


@pytest.mark.parametrize("runs", [[], [{"step": 1}], {"a": [{"loss": 1.0}]}, "missing.jsonl"])
def test_nothing_to_draw_is_said(tmp_path, runs):
    with pytest.raises(UserError, match="loss plot"):
        plots.loss_plot(runs, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_smoothing_keeps_a_straight_line_and_calms_noise():
    line = np.linspace(4, 1, 400)
    smooth = plots._smooth(line)
    np.testing.assert_allclose(smooth[:380], line[:380], atol=1e-9)
    noise = np.random.default_rng(0).normal(size=400)
    assert plots._smooth(noise)[20:].std() < 0.4
