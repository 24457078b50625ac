"""A row's scores and answer do not depend on the other rows of the call, as users' programs are compiled."""

import numpy as np
import pytest
from helpers.model_calls import IMAGES, PROMPTS

pytestmark = pytest.mark.default_compiler

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


def test_rows_are_generated_independently(model):
    answers = model.generate(IMAGES[:3], PROMPTS[:3], max_new_tokens=6)
    assert all(isinstance(text, str) for text in answers)
    alone = [
        model.generate([image], [prompt], max_new_tokens=6)[0]
        for image, prompt in zip(IMAGES[:3], PROMPTS[:3], strict=True)
    ]
    assert answers == alone
    assert len(set(answers)) == 3 and "" not in answers  # otherwise the test would prove nothing
