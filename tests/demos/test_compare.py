"""Parts of `make compare`, which runs all of it."""

import json

import pytest
from PIL import Image

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.demos import compare
from minigpt4_jax.demos.compare import WAYS, Measurement
from minigpt4_jax.errors import UserError
from minigpt4_jax.shapes.dataset import read_scenes, write_dataset


def measurement(**changes):
    values = {"caption": 1.0, "chat": 0.925, "other": 0.5, "attributes": 0.99, "ended": 1.0, "words": 41.0,
              "loss": 0.0961, "seconds": 170.4, "trained": 74304}  # fmt: skip
    return Measurement(**values | changes)


def test_table_shows_both_seeds_of_every_way():
    results = {way: [measurement(), measurement(chat=0.05, loss=2.25)] for way in WAYS}
    lines = compare.markdown_table(results, 40, (0, 3)).splitlines()
    for way, line in zip(WAYS, lines[2:], strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0].startswith(f"({way})") and cells[1] == "0.096 / 2.250"
        assert cells[3] == "92% / 5%" and cells[-1] == "74,304"
    assert "Seeds 0, 3" in "\n".join(lines)


def test_pictures_show_the_answers_of_all_ways(tmp_path):
    write_dataset(tmp_path / "shapes", train=1, heldout=6, heldout_pairs=1, size=56, progress=False)
    answers = {}
    for way in WAYS:
        (tmp_path / way).mkdir()
        records = [{"step": step, "loss": 1 / step} for step in (1, 2)]
        (tmp_path / way / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        answers[way] = ["a red circle"] * 6
    compare.RecipeComparison(tmp_path, (0,), 100, 6).draw_pictures(tmp_path, answers)
    sheet = Image.open(tmp_path / "contact_sheet.png")
    assert sheet.width > 4 * 500 and sheet.height > 6 * 168  # a row of four answers an image
    assert Image.open(tmp_path / "loss.png").width > 500


def test_judge_counts_entirely_right_texts(tmp_path):
    write_dataset(tmp_path, train=1, heldout=2, heldout_pairs=1, size=56, progress=False)
    scenes = read_scenes(tmp_path / "heldout")
    captions = [json.loads(line)["caption"]
                for line in (tmp_path / "heldout/captions.jsonl").read_text().splitlines()]  # fmt: skip
    assert compare.judge(scenes, captions) == (1.0, 1.0)
    right, attributes = compare.judge(scenes, [captions[0], "nothing"])
    assert right == 0.5 and 0.5 <= attributes < 1


def test_the_configurations_say_in_which_ways_the_qformer_learns(monkeypatch):
    assert [way for way in WAYS if compare.trains_qformer(way)] == ["a", "d"]
    monkeypatch.setitem(WAYS, "b", WAYS["b"]._replace(config="quickstart:qformer"))
    assert compare.trains_qformer("b") and compare.trains_qformer("c")


def test_trained_parameters_of_both_ways():
    config = ModelConfig()
    projection = compare.count_trained(config, qformer=False)
    assert projection == (config.qformer.hidden + 1) * config.llm.width
    assert compare.count_trained(config, qformer=True) > projection + 100_000_000


@pytest.mark.parametrize("seeds", ["", "a", "1,1", "0,,1", "-1"])
def test_wrong_seeds_are_an_error(seeds, tmp_path):
    with pytest.raises(UserError, match="--seeds"):
        compare.main([f"--seeds={seeds}", f"--workdir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
