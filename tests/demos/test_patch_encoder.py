"""The training of tiny_v2's vision encoder: its codes, the shipped weights, and that its output converts."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.cli import main as convert
from minigpt4_jax.checkpoint.model_directory import read_config
from minigpt4_jax.demos import encoder_training
from minigpt4_jax.demos import patch_encoder as trainer
from minigpt4_jax.shapes import scene as scenes


def test_a_code_describes_the_object_and_its_box():
    for index in range(20):
        scene = scenes.scene_at(3, index)
        codes = trainer.patch_codes(scene)
        rows = 1 + len(scene.objects)
        assert not codes[rows:].any()
        np.testing.assert_allclose(codes[:rows].mean(1), 0, atol=1e-6)
        np.testing.assert_allclose(codes[:rows].var(1), 1, atol=1e-4)
        assert codes[0].argmax() == trainer.FIRST_DIM[5] + scenes.BACKGROUNDS.index(
            scene.background
        )
        for i, o in enumerate(scene.objects):
            words = [
                codes[i + 1, a:b].argmax()
                for a, b in zip(trainer.FIRST_DIM, trainer.FIRST_DIM[1:6], strict=False)
            ]
            assert words == [
                i, scenes.SIZES.index(o.size), scenes.COLOR_NAMES.index(o.color),
                scenes.SHAPES.index(o.shape), scenes.CELLS.index(o.cell),
            ]  # fmt: skip
            box = trainer.decode_boxes(codes[i + 1]) * scene.image_size
            np.testing.assert_allclose(box, o.box, atol=2.5)


def test_labels_belong_to_the_image_and_mark_colors_without_a_name():
    drawn = [trainer.draw_example("train", i) for i in range(20)]
    assert 0 < sum(bool(d["unnamed"]) for d in drawn) < 20
    for index, d in enumerate(drawn):
        scene = scenes.scene_at(encoder_training.DATA_SEED, index)
        assert set(d["owners"]) == set(range(1 + len(scene.objects)))
    assert not any(trainer.draw_example("heldout", i)["unnamed"] for i in range(5))


def test_the_shipped_encoder_describes_words_and_boxes():
    """By the evaluation used in training, on scenes it was not trained on."""
    data = encoder_training.draw_range(trainer.draw_example, "heldout", 9000, 9060)
    model = trainer.load_encoder(trainer.SHIPPED)
    report = trainer.evaluate(lambda pixels: model(pixels) / trainer.GAIN, data)
    values = [float(v.rstrip("%")) for v in report.replace(",", "").split() if v.endswith("%")]
    assert len(values) == 7 and min(values[:6]) > 95, report


@pytest.mark.slow
def test_a_few_steps_write_an_encoder_that_converts(tmp_path, monkeypatch, capsys):
    from helpers.released_files import llm_config, llm_state, save_hf

    monkeypatch.setattr(encoder_training, "CHUNK", 4)  # the training images are drawn in a pool
    out = tmp_path / "vision.safetensors"
    trainer.train(out, steps=4, batch=4, lr=1e-3, images=8, judged=4)
    assert "step 4/4  loss" in capsys.readouterr().out
    written = load_file(out)
    assert {n.split(".")[0] for n in written} == {"vit", "ln_vision"}
    assert all(np.isfinite(a).all() and a.dtype == np.float16 for a in written.values())
    llm = save_hf(tmp_path / "llm", llm_config(), llm_state(llm_config()))
    convert(
        ["build", "--variant=minigpt-v2", f"--vision={out}", f"--llm={llm}",
         f"--out={tmp_path / 'model'}", "--set=merge_patches=2"]
    )  # fmt: skip
    config = read_config(tmp_path / "model")
    assert config.vision == encoder_training.VISION and config.visual_tokens == 32 and config.lora
