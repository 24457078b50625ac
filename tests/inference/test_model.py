"""The Python interface: inputs of its calls, independence of rows, and errors."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from helpers import tiny
from PIL import Image
from safetensors.numpy import load_file, save_file

import minigpt4_jax
from minigpt4_jax import GenerationConfig
from minigpt4_jax.errors import UserError
from minigpt4_jax.processing import chat_templates as texts
from minigpt4_jax.processing.tokenizer import load_tokenizer

pytestmark = pytest.mark.default_compiler

ASK = "###Human: <Img><ImageHere></Img> what is it ###Assistant: "
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def picture(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_random_model(tmp_path_factory.mktemp("api") / "model", max_text_length=12)


@pytest.fixture(scope="module")
def model(folder):
    return minigpt4_jax.load(folder, dtype="float32")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "model")


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


# --- rows ----------------------------------------------------------------------------------------

# one image, two images, text only, image only (score only)
PROMPTS = [ASK, "<ImageHere> or <ImageHere> then", "no image here", None]
IMAGES = [[picture(0)], [picture(1), picture(2)], None, picture(3)]
ANSWERS = ["a red car", "a dog", "yes", "a much longer answer that goes on " * 3]


def test_rows_are_scored_independently(model):
    nll, tokens = model.score(IMAGES, PROMPTS, ANSWERS)
    assert (nll.shape, nll.dtype, tokens.dtype) == ((4,), np.float32, np.int32)
    for i, (image, prompt, answer) in enumerate(zip(IMAGES, PROMPTS, ANSWERS, strict=True)):
        alone, count = model.score([image], [prompt], [answer])
        np.testing.assert_allclose(alone[0], nll[i], rtol=1e-5)
        assert count[0] == tokens[i]
    for n in range(3):  # the fourth is cut, without its end symbol
        assert tokens[n] == len(model.tokenizer.encode(ANSWERS[n] + "###"))
    assert tokens[3] == model.config.max_text_length
    reversed_nll, _ = model.score(IMAGES[::-1], PROMPTS[::-1], ANSWERS[::-1])
    np.testing.assert_allclose(reversed_nll[::-1], nll, rtol=1e-5)


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


def test_rows_are_generated_independently(model):
    answers = model.generate(IMAGES[:3], PROMPTS[:3], max_new_tokens=6)
    assert all(isinstance(text, str) for text in answers)
    alone = [
        model.generate([image], [prompt], max_new_tokens=6)[0]
        for image, prompt in zip(IMAGES[:3], PROMPTS[:3], strict=True)
    ]
    assert answers == alone
    assert len(set(answers)) == 3 and "" not in answers  # otherwise the test would prove nothing


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
    talk = model.conversation()
    assert talk.ask("what", picture(0), config) == model.conversation().ask(
        "what", picture(0), max_new_tokens=4, temperature=2.0, top_k=20, seed=1
    )
    again = talk.retry()  # with the options of the config and the next seed
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


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        ([], {}, "0 lists of candidates (of no texts) for 2 prompts"),
        ([["a"], ["b", "c"], ["d"]], {}, "3 lists of candidates (of 1, 2, 1 texts) for 2 prompts"),
        ([["a", "b"]], {"counts": [1]}, "1 counts for 2 prompts"),
        ([["a"], ["b"]], {"counts": [1, 1]}, "2 lists of candidates"),
        ([["a"], ["b"]], {"layout": "rows"}, "layout 'rows'"),
        ([["a"], ["b", 3]], {}, "got int; expected text"),
    ],
)
def test_candidates_that_do_not_fit_are_named(model, candidates, options, message):
    assert message in refused(model.multi_select, None, ["x", "y"], candidates, **options)


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


# --- errors -----------------------------------------------------------------------------


def refused(call, *args, **options):
    with pytest.raises(UserError) as e:
        call(*args, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", ["generate", "score"])
def test_images_and_tags_must_agree(model, name):
    one = picture(0)

    def line(images, prompts):
        answers = (["x"] * len(prompts),) if name == "score" else ()
        return refused(getattr(model, name), images, prompts, *answers)

    message = line([one, one], [ASK, "no tag"])
    assert "prompt 1" in message and "0 <ImageHere> and 1 images" in message
    assert "1 <ImageHere> and 0 images" in line(None, [ASK])
    assert "1 <ImageHere> and 2 images" in line([[one, one]], [ASK])
    assert "1 images for 2 prompts" in line([one], [ASK, ASK])
    assert "3 images for 1 prompts" in line([one] * 3, [ASK])
    assert "prompt 1 is empty" in line(None, ["x", " \n"])
    assert "prompt 0: got int" in line(None, [3])
    long = line(None, ["short", "a b c d " * 1000])
    assert "prompt 1" in long and str(model.config.llm.max_length) in long


def test_different_numbers_of_inputs(model):
    assert "1 answers for 2 prompts" in refused(model.score, None, ["a", "b"], ["c"])
    assert "answer 0: got NoneType" in refused(model.score, None, ["a"], [None])
    assert "1 seeds for 2 prompts" in refused(model.generate, None, ["a", "b"], seed=[1])
    assert "prompt 0: got NoneType" in refused(model.generate, [picture(0)], [None])
    assert "prompt 1: " in refused(model.generate, None, ["x", "\ud83d"])


def test_unknown_options_name_the_nearest(model):
    line = refused(model.generate, None, ["x"], temprature=1)
    assert line == "option 'temprature' is not known; did you mean temperature?"
    assert "known are max_new_tokens, " in refused(model.generate, None, ["x"], zzz=1)
    assert "did you mean top_k" in refused(model.stream, None, "x", topk=1)
    assert "did you mean seed" in refused(model.conversation().ask, "x", sed=1)
    line = refused(model.generate, None, ["x"], {"seed": 1})
    assert line.startswith("config: got dict; expected a GenerationConfig")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature -1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0}, "top_p 0"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_k": 2.5}, "top_k 2.5: expected a whole number"),
        ({"top_k": 1 << 40}, "expected less than 2^31"),
        ({"temperature": "warm"}, "temperature 'warm': expected a number"),
        ({"context": "long"}, "context 'long'"),
        ({"seed": 1.5}, "seed 1.5: expected a whole number"),
        ({"seed": ["a"]}, "seed ['a']"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"repetition_penalty": 0}, "repetition_penalty 0"),
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"max_new_tokens": 10**6}, "max_new_tokens 1000000"),
    ],
)
def test_options_out_of_range(model, options, message):
    assert message in refused(model.generate, None, ["x"], **options)


def test_an_unreadable_image_is_named(model, tmp_path):
    bad, good = tmp_path / "bad.png", picture(0)
    bad.write_bytes(b"<html>no</html>")
    message = refused(model.encode_images, [good, bad])
    assert message.startswith("image 1: ") and "bad.png" in message and "web page" in message
    assert "image 2: " in refused(model.encode_images, [good, good, tmp_path / "none.png"])
    assert "image 1: " in refused(model.generate, [good, bad], [ASK, ASK])
    message = refused(model.score, [good, [good, bad]], [ASK, PROMPTS[1]], ["x", "y"])
    assert message.startswith("image 1 of prompt 1: ")
    assert "float64 [4, 4, 3]" in refused(model.encode_images, [np.full((4, 4, 3), 2.0)])
    assert "image 0: got int" in refused(model.encode_images, [3])


# --- weights and logits that are not finite -----------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(folder, tmp_path_factory):
    """(directory, prompt): the model with NaN in the embedding of a token that this prompt ends with."""
    copy = shutil.copytree(folder, tmp_path_factory.mktemp("poisoned") / "model")
    token = load_tokenizer(copy / "tokenizer").encode("what is zq")[-1]
    (path,) = (p for p in copy.glob("llm-*") if "llm.embed" in load_file(p))
    tensors = load_file(path)
    tensors["llm.embed"][token] = np.nan
    save_file(tensors, path)
    return copy, "what is zq"


def test_weights_that_are_not_finite_load_only_on_request(poisoned):
    assert "llm.embed: 24 of" in refused(minigpt4_jax.load, poisoned[0])
    minigpt4_jax.load(poisoned[0], "float32", allow_nonfinite=True)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}])
def test_logits_that_are_not_finite_are_one_answers_error(model, poisoned, options):
    bad_model, bad = minigpt4_jax.load(poisoned[0], "float32", allow_nonfinite=True), poisoned[1]
    options |= {"max_new_tokens": 4}
    prompts = ["a dog", bad, "the red car"]
    details = bad_model.generate_details(None, prompts, **options)
    assert {output.finish_reason for output in details[1]} == {"error"}
    assert all("NaN or infinite" in output.error for output in details[1])
    good = [outputs for i, outputs in enumerate(details) if i != 1]
    assert all(output.error is None for outputs in good for output in outputs)
    expected = model.generate(None, prompts[::2], **options)
    assert [output.text for outputs in good for output in outputs] == expected
    message = refused(bad_model.generate, None, prompts, **options)
    assert message.startswith("prompt 1: ") and "NaN or infinite" in message


def test_streams_and_conversations_say_that_logits_are_not_finite(poisoned):
    model, bad = minigpt4_jax.load(poisoned[0], "float32", allow_nonfinite=True), poisoned[1]
    assert "NaN or infinite" in refused(lambda: list(model.stream(None, bad)))
    talk = model.conversation(template=texts.ChatTemplate("{}", "{}"))
    assert "NaN or infinite" in refused(talk.ask, bad, max_new_tokens=4)
    assert talk.turns == []
    answer = talk.ask("a dog", max_new_tokens=4)
    assert answer == model.conversation(template=talk.template).ask("a dog", max_new_tokens=4)


# --- compiled programs -----------------------------------------------------------------------------


def test_load_keeps_compiled_programs_on_disk(folder, tmp_path):
    """In the folder of the variable, unless that is "off" or the user has set one up."""
    program = (
        "import sys, jax, minigpt4_jax\n"
        "minigpt4_jax.load(sys.argv[1])\n"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    own = str(tmp_path / "own")
    for variables, expected in (
        ({"MINIGPT4_JAX_CACHE": str(tmp_path)}, str(tmp_path / "xla-")),
        ({"MINIGPT4_JAX_CACHE": "off"}, "None"),
        ({"MINIGPT4_JAX_CACHE": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": own}, own),
    ):
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        done = subprocess.run(
            [sys.executable, "-c", program, folder],
            env=environment | variables, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.startswith(expected)


# --- model directories ---------------------------------------------------------------------------


def test_not_a_model_directory(tmp_path):
    line = refused(minigpt4_jax.load, tmp_path)
    assert str(tmp_path) in line and "not a model directory" in line and "convert build" in line
    assert "not a model directory" in refused(minigpt4_jax.load, tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "file" in refused(minigpt4_jax.load, tmp_path / "file")


def test_unknown_dtype(folder):
    line = refused(minigpt4_jax.load, folder, "float16")
    assert "float16" in line and "float32, bfloat16" in line


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights(copy, share):
    path = copy / "llm-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    line = refused(minigpt4_jax.load, copy)
    assert path.name in line and "damaged" in line and "convert the model again" in line


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', "<html>"])
def test_damaged_document(copy, text):
    (copy / "model.json").write_text(text)
    assert "model.json is damaged" in refused(minigpt4_jax.load, copy)


def test_documents_that_do_not_fit_the_files(copy):
    document = json.loads((copy / "model.json").read_text())

    def line(**changes):
        (copy / "model.json").write_text(json.dumps(document | changes))
        return refused(minigpt4_jax.load, copy)

    assert "format 9" in line(format=9)
    assert "'new'" in line(config=document["config"] | {"new": 1})
    assert "minigpt5" in line(config=document["config"] | {"variant": "minigpt5"})
    assert "does not exist" in line(base="../gone")
    assert "is a cycle" in line(base=".")
    wider = document["config"]["llm"] | {"ffn": 48}
    message = line(config=document["config"] | {"llm": wider})
    assert str(copy) in message and "llm.blocks.0.mlp.up.weight" in message


def test_missing_files(copy):
    projection = copy / "projection-00001.safetensors"
    data = projection.read_bytes()
    projection.unlink()
    message = refused(minigpt4_jax.load, copy)
    assert str(copy) in message and "projection.weight: missing" in message
    shutil.rmtree(copy / "tokenizer")
    projection.write_bytes(data)
    assert "has no tokenizer/" in refused(minigpt4_jax.load, copy)
