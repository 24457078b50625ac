"""The Python interface: inputs of its calls, options and ranking."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from helpers.model_calls import ASK, IMAGES, PROMPTS, picture
from helpers.user_errors import refused
from PIL import Image

from minigpt4_jax import GenerationConfig
from minigpt4_jax.processing import chat_templates as texts

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


# --- images --------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_path_a_pil_image_and_an_array_encode_alike(model, tmp_path):
    array = picture(0)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    visual = model.encode_images([path, str(path), Image.fromarray(array), array])
    assert visual.shape == (4, model.config.visual_tokens, model.config.llm.width)
    assert visual.dtype == np.float32
    for other in visual[1:]:
        np.testing.assert_array_equal(other, visual[0])
    assert not np.allclose(model.encode_images([picture(1)])[0], visual[0], atol=1e-2)


def test_a_single_image_a_stack_and_none(model, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(0)).save(path)
    stack = np.stack([picture(0), picture(1)])
    visual = model.encode_images(stack)
    np.testing.assert_allclose(model.encode_images(path), visual[:1], **CLOSE)
    np.testing.assert_allclose(model.encode_images(Image.open(path)), visual[:1], **CLOSE)
    np.testing.assert_allclose(model.encode_images(picture(0)), visual[:1], **CLOSE)
    assert model.encode_images([]).shape == (0, *visual.shape[1:])
    answers = [model.generate(i, [ASK], max_new_tokens=4) for i in (path, path.read_bytes())]
    assert answers[0] == answers[1]


def test_more_images_than_one_batch_stay_in_order(model):
    images = [picture(i) for i in range(11)]
    visual = model.encode_images(images)
    for i in (0, 7, 8, 10):
        np.testing.assert_allclose(visual[i], model.encode_images([images[i]])[0], **CLOSE)


def test_other_options_compile_nothing(model):
    """Limits, stops and penalties are data of the compiled programs; so are the options of sampling."""
    generate = partial(model.generate, None, ["a dog"])
    programs = (model.engine._prefill, model.engine._decode)
    for first, others in (
        ({}, ({"max_new_tokens": 90}, {"stop": ["zz", "one, two", "###"]}, {"stop_ids": [5, 6]})),
        (
            {"repetition_penalty": 1.1},
            ({"frequency_penalty": 0.5}, {"min_new_tokens": 3}, {"presence_penalty": 0.5}),
        ),
        (
            {"temperature": 0.7, "top_k": 40},
            ({"temperature": 1.5, "top_k": 3}, {"temperature": 1.0, "top_k": 64, "top_p": 0.5},
             {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1.2}),
        ),
    ):  # fmt: skip
        generate(**({"max_new_tokens": 4} | first))
        compiled = [program._cache_size() for program in programs]
        for options in others:
            generate(**({"max_new_tokens": 8} | options))
            assert [program._cache_size() for program in programs] == compiled, options


# --- rows ----------------------------------------------------------------------------------------


def test_numbers_are_answers_and_candidates(model):
    images, prompts = [picture(0)] * 3, [ASK] * 3
    numbers, texts = [3, 0.5, np.int64(12)], ["3", "0.5", "12"]
    expected = model.score(images, prompts, texts)[0]
    np.testing.assert_array_equal(model.score(images, prompts, numbers)[0], expected)
    order = model.multi_select(images[:1], prompts[:1], [texts])
    assert model.multi_select(images[:1], prompts[:1], [numbers]) == order
    assert "answer 1: got bool" in refused(model.score, None, ["a", "b"], [1, True])


def test_a_stack_of_images_is_the_images_of_a_prompt(model):
    pair = [picture(0), picture(1)]
    two = "<ImageHere> or <ImageHere>"
    assert (
        model.score([np.stack(pair)], [two], ["a"])[0] == model.score([pair], [two], ["a"])[0]
    ).all()


def test_images_and_their_order_change_the_score(model):
    one, other = picture(1), picture(2)
    prompts, answers = [PROMPTS[1]] * 3, ["a dog"] * 3
    nll, _ = model.score([[one, other], [other, one], [one, one]], prompts, answers)
    assert np.abs(np.diff(nll)).min() > 1e-3


def test_text_only_needs_no_list_of_images(model):
    questions, answers = ["what is red", "and blue"], ["a", "b"]
    nll, _ = model.score(None, questions, answers)
    np.testing.assert_allclose(model.score([None] * 2, questions, answers)[0], nll, rtol=1e-6)
    answers = model.generate(None, questions, max_new_tokens=4)
    assert answers == model.generate([None, None], questions, max_new_tokens=4)


def test_template_is_that_of_training(model):
    images, question = [picture(0)], "what is it"
    spelled = model.config.prompt_template.replace("{}", texts.with_images(question, 1))
    plain = model.score(images, [question], ["a dog"], template=True)[0]
    np.testing.assert_array_equal(plain, model.score(images, [spelled], ["a dog"])[0])
    answer = model.generate(images, [question], template=True, max_new_tokens=6)
    assert answer == model.generate(images, [spelled], max_new_tokens=6)


def test_seeds(model):
    images, prompts = [picture(0)] * 4, [ASK] * 4
    options = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 20}
    equal = model.generate(images, prompts, seed=3, **options)
    assert len(set(equal)) == 1  # equal prompts get equal answers under one seed
    sampled = model.generate(images, prompts, seed=range(4), **options)
    assert sampled[3] == equal[0] and len(set(sampled)) > 1
    assert model.generate(images, prompts, seed=range(4), **options) == sampled
    assert model.generate(images, prompts, seed=np.int64(3), **options) == equal
    coldest = model.generate(images, prompts, max_new_tokens=6, temperature=1e-40, seed=range(4))
    assert coldest == model.generate(images, prompts, max_new_tokens=6)


def test_context_cuts_a_long_prompt_on_the_left(model):
    long = "a b c d " * 50
    cut = model.generate(None, [long], context=24, max_new_tokens=4)
    assert model.generate(None, ["x y z" + long], context=24, max_new_tokens=4) == cut
    # the end of the prompt remains
    assert model.generate(None, [long + "what is"], context=24, max_new_tokens=4) != cut


def test_options_by_name_replace_those_of_a_config(model):
    config = GenerationConfig(max_new_tokens=4, temperature=2.0, top_k=20, seed=1)
    images = [picture(0)] * 2
    answers = model.generate(images, [ASK, ASK], config, seed=[1, 2], batch_size=1)
    expected = model.generate(
        images, [ASK, ASK], max_new_tokens=4, temperature=2.0, top_k=20, seed=[1, 2]
    )
    assert answers == expected
    assert answers[0] == "".join(model.stream(picture(0), ASK, config))
    (details,) = model.generate_details([picture(0)], [ASK], config)
    assert details[0].text == answers[0] and len(details[0].ids) <= 4
    conversation = model.conversation()
    assert conversation.ask("what", picture(0), config) == model.conversation().ask(
        "what", picture(0), max_new_tokens=4, temperature=2.0, top_k=20, seed=1
    )
    again = conversation.retry()  # with the options of the config and the next seed
    seed_2 = replace(config, seed=2)
    assert again == "".join(model.conversation().stream("what", picture(0), seed_2))


# --- ranking and rotated photos -------------------------------------------------------------------

CANDIDATES = [["a dog", "a cat", "a red car"], ["yes"], ["blue", "a much longer answer"], []]


def test_candidates_are_ranked_by_prompt_or_as_the_original(model):
    prompts, images = [*PROMPTS[:3], ASK], [*IMAGES[:3], [picture(4)]]
    ranking = model.multi_select(images, prompts, CANDIDATES)
    assert [sorted(row) for row in ranking] == [[0, 1, 2], [0], [0, 1], []]
    rows = [["a dog", "a cat", "a red car"], ["no", "yes", "perhaps"]]
    columns = [list(column) for column in zip(*rows, strict=True)]
    losses = [model.candidate_loss(images[:2], prompts[:2], answers) for answers in columns]
    expected = np.argsort(np.stack(losses, 1), axis=1, kind="stable").tolist()
    pair = (images[:2], prompts[:2])
    assert model.multi_select(*pair, rows) == expected
    assert model.multi_select(*pair, columns) == expected
    assert model.multi_select(*pair, columns, [3, 2])[0] == expected[0]
    assert model.multi_select(*pair, columns, [3, 2])[1][-1] == 2
    assert model.multi_select(*pair, columns, np.array([3, 0]))[0] == expected[0]
    assert model.multi_select(*pair, (iter(row) for row in rows)) == expected
    assert model.multi_select([], [], []) == []


def test_square_candidates_need_their_layout(model):
    rows, prompts = [["yes", "a dog"], ["no", "what a cat that is"]], ["so", "is it"]
    columns = [list(column) for column in zip(*rows, strict=True)]
    message = refused(model.multi_select, None, prompts, rows)
    assert (
        "both ways" in message and "layout='prompt'" in message and "layout='candidate'" in message
    )
    expected = model.multi_select(None, prompts, rows, layout="prompt")
    assert model.multi_select(None, prompts, columns, layout="candidate") == expected
    assert model.multi_select(None, prompts, columns, [2, 2]) == expected
    assert model.multi_select(None, ["so"], [["yes"]]) == [[0]]
    same = [["yes", "no"], ["no", "yes"]]
    assert len(model.multi_select(None, prompts, same)) == 2  # equal in both layouts


def test_one_list_of_candidates_is_for_one_prompt(model):
    assert model.multi_select(None, ["a dog"], ["red", "blue"]) == model.multi_select(
        None, ["a dog"], [["red", "blue"]]
    )
    message = refused(model.multi_select, None, ["a dog", "a cat"], ["red", "blue"])
    assert "a list for each prompt" in message


def test_candidates_with_the_training_template(model):
    images, question, rows = [picture(0)], "what is it", [["a dog", "a red car", "b"]]
    spelled = model.config.prompt_template.replace("{}", texts.with_images(question, 1))
    ranking = model.multi_select(images, [question], rows, template=True)
    assert ranking == model.multi_select(images, [spelled], rows)


def test_exif_orientation_is_applied_on_request(model, monkeypatch, tmp_path):
    stored, turned = tmp_path / "stored.png", tmp_path / "turned.png"
    image = Image.fromarray(picture(5))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees clockwise
    image.save(stored, exif=exif)
    image.transpose(Image.Transpose.ROTATE_270).save(turned)
    before, shown = model.encode_images([stored, turned])
    assert not np.allclose(before, shown, atol=1e-2)
    monkeypatch.setattr(model, "exif", True)
    np.testing.assert_allclose(model.encode_images(stored)[0], shown, **CLOSE)
    answers = model.generate([stored, turned], [ASK, ASK], max_new_tokens=6)
    assert answers[0] == answers[1]
    talks = [model.conversation().ask("what", path, max_new_tokens=6) for path in (stored, turned)]
    assert talks[0] == talks[1]
