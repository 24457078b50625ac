"""A run that was started before a setting existed continues without it."""

import json

import pytest

from minigpt4_jax.training.config import TrainConfig
from minigpt4_jax.training.config_values import differences, to_dict
from minigpt4_jax.training.workdir import keep_old_defaults

pytestmark = pytest.mark.smoke


def test_images_of_a_run_without_exif_in_its_configuration_are_not_rotated(tmp_path):
    c = TrainConfig()
    assert c.data.exif and keep_old_defaults(tmp_path / "new", c) == c
    old = to_dict(c)
    (tmp_path / "config.json").write_text(json.dumps({"config": old, "model": ""}))
    assert keep_old_defaults(tmp_path, c) == c
    del old["data"]["exif"]
    (tmp_path / "config.json").write_text(json.dumps({"config": old, "model": ""}))
    kept = keep_old_defaults(tmp_path, c)
    assert not kept.data.exif and not differences(old, to_dict(kept))
    assert differences(old, to_dict(c)) == ["data.exif: False -> True"]


@pytest.mark.parametrize("text", ["", "[]", '{"config": 3}', '{"config": {"data": null}}'])
def test_a_damaged_configuration_is_left_to_the_later_check(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert keep_old_defaults(tmp_path, TrainConfig()) == TrainConfig()
