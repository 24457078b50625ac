"""Calls with many images: encoded as rows are admitted; bad prompts and images are single answers' errors."""

import gc

import jax
import numpy as np
import pytest
from helpers.model_calls import ASK, picture
from PIL import Image

import minigpt4_jax
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference import encode_ahead
from minigpt4_jax.inference.generation_config import GenerationConfig
from minigpt4_jax.processing.images import load_pixels

FEW = {"max_new_tokens": 3}


@pytest.fixture
def encoded(model, monkeypatch):
    """How many images each call of the encoder got."""
    sizes, encode = [], model._encoder.encode
    monkeypatch.setattr(
        model._encoder, "encode", lambda state, p: sizes.append(len(p)) or encode(state, p)
    )
    return sizes


def most_visual_tokens(model, num_images, monkeypatch, **options):
    """The most bytes of visual tokens that are alive at once in a call."""
    c, peak = model.config, 0

    def live_bytes():
        shape = (c.visual_tokens, c.llm.width)
        return sum(a.nbytes for a in jax.live_arrays() if a.shape[-2:] == shape)

    def measure(image, *args, **kwargs):
        nonlocal peak
        peak = max(peak, live_bytes() - before)
        return load_pixels(image, *args, **kwargs)

    gc.collect()
    before = live_bytes()
    monkeypatch.setattr("minigpt4_jax.inference.text_generator.load_pixels", measure)
    images = [picture(i) for i in range(num_images)]
    answers = model.generate(images, [ASK] * num_images, batch_size=4, **FEW, **options)
    assert len(answers) == num_images
    return peak


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_memory_does_not_grow_with_the_number_of_images(model, monkeypatch, options):
    peak = most_visual_tokens(model, 160, monkeypatch, **options)
    per_image = 4 * model.config.visual_tokens * model.config.llm.width
    # 4 running rows and one that waits, and two batches of the encoder with copies of each image
    assert 0 < peak <= (5 + 2 * 2 * 8) * per_image


def test_scores_encode_in_blocks(model, monkeypatch, encoded):
    monkeypatch.setattr(minigpt4_jax.inference.model, "SCORE_BLOCK", 4)
    images = [picture(i) for i in range(10)]
    answers = ["a dog"] * 10
    nll, _ = model.score(images, [ASK] * 10, answers)
    assert max(encoded) <= 8 and sum(encoded) == 10
    np.testing.assert_allclose(nll[7], model.score([images[7]], [ASK], ["a dog"])[0][0], rtol=1e-5)
    encoded.clear()
    order = model.multi_select(images, [ASK] * 10, [["yes", "no"]] * 10, layout="prompt")
    assert sum(encoded) == 10  # for both candidates
    assert order[9] == model.multi_select([images[9]], [ASK], [["yes", "no"]])[0]


def test_an_image_of_several_prompts_is_encoded_once(model, encoded, monkeypatch):
    monkeypatch.setattr(encode_ahead, "MAX_KEPT", 10)
    images = [picture(i) for i in range(20)]
    one = picture(99)
    rows = [pair for image in images for pair in ([one, image], [image])]
    expected = [
        model.generate([row], ["<ImageHere>" * len(row) + "what"], **FEW)[0] for row in rows
    ]
    encoded.clear()
    answers = model.generate(rows, ["<ImageHere>" * len(row) + "what" for row in rows], **FEW)
    assert answers == expected
    assert sum(encoded) == 21


def test_visual_tokens_stay_on_the_device(model):
    (tokens,) = model.visual_tokens([picture(0)])
    assert isinstance(tokens, jax.Array)
    np.testing.assert_array_equal(model.encode_images(picture(0))[0], np.asarray(tokens))
    (request,) = model.prepare_requests([picture(0)], [ASK], GenerationConfig())
    assert isinstance(request.visual, jax.Array)
    conversation = model.conversation()
    conversation.ask("what is it", picture(0), **FEW)
    ((_, kept),) = conversation._encoded.values()
    assert isinstance(kept, jax.Array)


def test_bad_prompts_and_images_are_single_answers_errors(model, tmp_path):
    good, broken = tmp_path / "good.png", tmp_path / "broken.png"
    Image.fromarray(picture(0)).save(good)
    broken.write_bytes(good.read_bytes()[:300])
    images = [good, broken, None, None, [good, tmp_path / "none.png"], good]
    prompts = [ASK, ASK, "long " * 10_000, "", "<ImageHere><ImageHere>", ASK]
    errors = [None, "truncated", "exceed", "empty", "image 1 of the prompt: ", None]
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}):
        details = model.generate_details(images, prompts, on_error="return", **FEW, **options)
        count = options.get("num_return_sequences", 1)
        assert {len(outputs) for outputs in details} == {count}
        for outputs, error in zip(details, errors, strict=True):
            for output in outputs:
                assert (
                    (output.error is None) == (error is None) == (output.finish_reason != "error")
                )
                assert error is None or (error in output.error and output.text == "")
        alone = model.generate([good], [ASK], **FEW, **options)
        assert [output.text for output in details[0] + details[5]] == alone * 2
    with pytest.warns(UserWarning, match=r"4 of 6 prompts have no answer .*prompt 1: .*truncated"):
        texts = model.generate(images, prompts, on_error="return", **FEW)
    answer = model.generate([good], [ASK], **FEW)[0]
    assert texts == [answer if error is None else "" for error in errors] and answer


def test_by_default_the_first_error_is_raised_before_any_answer(model, tmp_path, monkeypatch):
    broken = tmp_path / "broken.png"
    Image.fromarray(picture(0)).save(broken)
    broken.write_bytes(broken.read_bytes()[:300])
    images = [picture(i) for i in range(6)] + [broken]
    monkeypatch.setattr(model.engine, "_prefill", None)  # nothing is generated
    with pytest.raises(UserError, match=r"image 6: .*broken\.png"):
        model.generate(images, [ASK] * 7, batch_size=2, **FEW)
    with pytest.raises(UserError, match=r"prompt 3: .*empty"):
        model.generate(None, ["a", "b", "c", "", ""], batch_size=2, **FEW)
    with pytest.raises(UserError, match="on_error 'skip': expected 'raise' or 'return'"):
        model.generate(None, ["a"], on_error="skip", **FEW)
