"""Weights and logits that are NaN or infinite."""

import shutil

import numpy as np
import pytest
from helpers.user_errors import refused
from safetensors.numpy import load_file, save_file

import minigpt4_jax
from minigpt4_jax.processing import chat_templates as texts
from minigpt4_jax.processing.tokenizer import load_tokenizer


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
    conversation = model.conversation(template=texts.ChatTemplate("{}", "{}"))
    assert "NaN or infinite" in refused(conversation.ask, bad, max_new_tokens=4)
    assert conversation.turns == []
    answer = conversation.ask("a dog", max_new_tokens=4)
    assert answer == model.conversation(template=conversation.template).ask(
        "a dog", max_new_tokens=4
    )
