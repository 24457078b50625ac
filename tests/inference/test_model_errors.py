"""Wrong inputs and options of the Python interface: one line that names what and where."""

import numpy as np
import pytest
from helpers.model_calls import ASK, TWO_IMAGES, picture
from helpers.user_errors import refused


@pytest.mark.parametrize(
    ("candidates", "options", "message"),
    [
        ([], {}, "0 lists of candidates (of no texts) for 2 prompts"),
        ([["a"], ["b", "c"], ["d"]], {}, "3 lists of candidates (of 1, 2, 1 texts) for 2 prompts"),
        ([["a", "b"]], {"counts": [1]}, "1 counts for 2 prompts"),
        ([["a"], ["b"]], {"counts": [1, 1]}, "2 lists of candidates"),
        ([["a"], ["b"]], {"layout": "rows"}, "layout 'rows'"),
        (
            [["a"], ["b", None]],
            {},
            "candidate 1 of prompt 1: got NoneType; expected text or a number",
        ),
        ([["a", "b"]] * 3, {"counts": [2, 4]}, "count 1 is 4; expected 0 to 3, the number of cand"),
        ([["a", "b"]], {"counts": [-1, 1]}, "count 0 is -1; expected 0 to 1"),
        ([["a", "b"]], {"counts": [1, 0.5]}, "count 1 is 0.5; expected a whole number"),
        ([["a", "b"]], {"counts": ["1", "1"]}, "count 0 is '1'; expected a whole number"),
        ([["a", "b"]], {"counts": [[1], [1]]}, "count 0 is [1]; expected a whole number"),
        ([["a", "b"]], {"counts": 1}, "0 counts for 2 prompts"),
        (None, {}, "candidates: got NoneType; expected a list of candidates for each prompt"),
        ("red", {}, "candidates: got str; expected a list"),
        ([["a"], None], {}, "candidates 1: got NoneType; expected a list of texts"),
        ([["a"], {"a", "b"}], {}, "candidates 1: got set; expected a list of texts"),
    ],
)
def test_candidates_that_do_not_fit_are_named(model, candidates, options, message):
    assert message in refused(model.multi_select, None, ["x", "y"], candidates, **options)


def test_a_candidate_that_is_too_long_is_of_the_prompt_that_is_named(model):
    message = refused(model.multi_select, None, ["x", "y " * 9000], [["a"], ["b"]])
    assert message.startswith("prompt 1: ")
    message = refused(model.multi_select, None, ["x", "y " * 9000], [[], ["b"]])
    assert message.startswith("prompt 1: ")


def test_a_stop_token_that_the_model_does_not_have(model):
    vocab = model.config.llm.vocab
    message = refused(model.generate, None, ["x"], stop_ids=[3, vocab])
    assert f"stop_ids {vocab}: the model has {vocab} tokens" in message


def test_images_by_name_are_no_list(model):
    message = refused(model.generate, {"image": picture(0)}, [ASK])
    assert "images: got a dictionary" in message


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
    assert "prompt 1: empty" in line(None, ["x", " \n"])
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
    message = refused(model.score, [good, [good, bad]], [ASK, TWO_IMAGES], ["x", "y"])
    assert message.startswith("image 1 of prompt 1: ")
    assert "float64 [4, 4, 3]" in refused(model.encode_images, [np.full((4, 4, 3), 2.0)])
    assert "image 0: got int" in refused(model.encode_images, [3])
