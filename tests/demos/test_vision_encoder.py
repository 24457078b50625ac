"""The training of the quickstart's vision encoder: labels, codes, and that its output converts."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.cli import main as convert
from minigpt4_jax.checkpoint.model_directory import Tensors, read_config
from minigpt4_jax.demos import encoder_training
from minigpt4_jax.demos import vision_encoder as trainer
from minigpt4_jax.shapes import scene as scenes
from minigpt4_jax.shapes.labels import scene_labels

TRAIN = range(40)  # some images of the training split


def is_unnamed(index):
    """Whether a training image's objects are drawn in colors without a name."""
    rng = np.random.default_rng([encoder_training.DATA_SEED, index])
    return rng.random() < encoder_training.UNNAMED_SHARE


def word(label, value):
    """The word of a label's value; value 0 is "none"."""
    return trainer.FIRST_WORD[label] + value


def test_codes_are_nearly_orthogonal_and_standardized():
    (codes,) = np.unique(trainer.query_codes(0.0), axis=0)  # the same for all queries
    width = trainer.QFORMER.hidden
    assert codes.shape == (trainer.WORDS, width) and codes.dtype == np.float32
    cosines = codes @ codes.T / width
    np.testing.assert_allclose(cosines, np.eye(trainer.WORDS), atol=0.02)
    np.testing.assert_allclose(codes.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(codes.var(1), 1, atol=1e-4)


def test_codes_of_the_second_phase_distinguish_the_objects():
    plain, numbered = trainer.query_codes(0.0), trainer.query_codes(0.5)
    np.testing.assert_allclose(numbered.var(-1), 1, atol=1e-4)
    same_word = (numbered[:, None, 5] * numbered[None, :, 5]).mean(-1)  # [13, 13] cosines
    objects = np.arange(trainer.QFORMER.queries) // len(trainer.QUERY_ORDER)
    same_object = objects[:, None] == objects
    assert (same_word[same_object] > 0.99).all() and (same_word[~same_object] < 0.9).all()
    assert ((numbered * plain).mean(-1) > 0.85).all()  # the word is still the larger part


@pytest.mark.parametrize("index", range(6))
def test_queries_name_size_color_shape_and_position_in_reading_order(index):
    scene = scenes.scene_at(3, index, "heldout")
    words = trainer.query_words(scene_labels(scene, encoder_training.GRID))
    assert words.shape == (trainer.QFORMER.queries,)
    expected = []
    for o in scene.objects:
        expected += [
            word(2, 1 + scenes.SIZES.index(o.size)),
            word(1, 1 + scenes.COLOR_NAMES.index(o.color)),
            word(0, 1 + scenes.SHAPES.index(o.shape)),
            word(3, 1 + scenes.CELLS.index(o.cell)),
        ]
    for _ in range(scenes.MAX_OBJECTS - len(scene.objects)):
        expected += [word(2, 0), word(1, 0), word(0, 0), word(3, 0)]
    expected.append(trainer.FIRST_WORD[-1] + scenes.BACKGROUNDS.index(scene.background))
    assert words.tolist() == expected


def test_unnamed_colors_are_far_from_named_ones():
    named = np.array(list(scenes.COLORS.values()))
    for index in TRAIN:
        scene = scenes.scene_at(encoder_training.DATA_SEED, index)
        changed = encoder_training.with_unnamed_colors(scene, np.random.default_rng(index))
        for before, after in zip(scene.objects, changed.objects, strict=True):
            assert (before.shape, before.box) == (after.shape, after.box)
            assert np.linalg.norm(named - after.rgb, axis=1).min() > 60


def test_unnamed_colors_are_not_labels():
    unnamed = [i for i in TRAIN if is_unnamed(i)]
    assert 0 < len(unnamed) < len(TRAIN)
    for index in TRAIN:
        drawn = trainer.draw_example("train", index)
        num_objects = len(scenes.scene_at(encoder_training.DATA_SEED, index).objects)
        colors, others = drawn["words"][1:-1:4], np.delete(drawn["words"], np.s_[1:-1:4])
        ignored = colors == trainer.IGNORED
        assert ignored.sum() == (num_objects if index in unnamed else 0)
        assert (others != trainer.IGNORED).all()
        shows_object = drawn["patches"][:, 0] > 0
        assert ((drawn["patches"][shows_object, 1] == trainer.IGNORED) == (index in unnamed)).all()
        assert not drawn["patches"][~shows_object].any()
    for index in range(5):
        held_out = trainer.draw_example("heldout", index)
        assert (held_out["words"] != trainer.IGNORED).all()


@pytest.mark.slow
def test_a_few_steps_write_an_encoder_that_converts(tmp_path, capsys):
    from helpers.released_files import llm_config, llm_state, save_hf

    out = tmp_path / "vision.safetensors"
    trainer.train(out, steps=4, batch=4, lr=1e-3, images=8, seed=0, judged=4)
    assert "step 4/4  loss" in capsys.readouterr().out
    written = load_file(out)
    assert {n.split(".")[0] for n in written} == {"vit", "ln_vision", "qformer"}  # no heads
    assert all(np.isfinite(a).all() and a.dtype == np.float16 for a in written.values())
    assert out.stat().st_size < 8e6  # what the package may ship

    llm = save_hf(tmp_path / "llm", llm_config(), llm_state(llm_config()))
    convert(["build", f"--vision={out}", f"--llm={llm}", f"--out={tmp_path / 'model'}"])
    config, tensors = read_config(tmp_path / "model"), Tensors(tmp_path / "model")
    assert (config.vision, config.qformer) == (encoder_training.VISION, trainer.QFORMER)
    assert all(np.array_equal(tensors[n], written[n]) for n in written)
