"""Metadata of the tokenizer in a GGUF file: used, refused by name, or named in a note."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import chat_families
from helpers.gguf_files import gguf, write_gguf
from helpers.released_files import llm_config, llm_state

from convert.build_plan import BuildRequest, make_plan
from convert.end_tokens import gguf_end_ids
from convert.formats.gguf import Gguf
from convert.formats.gguf_tokenizer import tokenizer_files, unsaid
from minigpt4_jax.errors import UserError

VALUES = [3, -1, 0.5, "x", "", True, [1, 2], ["a"], [0.5], [None], {"a": 1}]
KEYS = [
    "ggml.model", "ggml.pre", "ggml.tokens", "ggml.token_type", "ggml.scores", "ggml.merges",
    "ggml.bos_token_id", "ggml.eos_token_id", "ggml.unknown_token_id", "ggml.padding_token_id",
    "ggml.add_bos_token", "ggml.add_space_prefix", "ggml.remove_extra_whitespaces", "chat_template",
]  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def source(request, tmp_path_factory):
    folder, config = tmp_path_factory.mktemp("gguf"), llm_config(vocab_size=785)
    tokenizer = None
    if request.param == "gpt2":
        tokenizer = chat_families.write_tokenizer(folder / "t", chat_families.FAMILIES["zephyr"])
    return Gguf(write_gguf(folder / "a.gguf", config, llm_state(config), tokenizer=tokenizer))


def with_fields(source, **changes):
    """The same file with other metadata, by names without `tokenizer.`; None: without it."""
    changed = copy.copy(source)
    changed._values = dict(source._values)
    for name, value in changes.items():
        del_name = f"tokenizer.{name}"
        changed._values.pop(del_name, None)
        if value is not None:
            changed._values[del_name] = SimpleNamespace(contents=lambda value=value: value)
    return changed


@pytest.mark.parametrize("name", KEYS)
def test_a_value_of_another_type_is_refused_by_name(source, name):
    fits = {
        "ggml.bos_token_id": [3], "ggml.eos_token_id": [3], "ggml.unknown_token_id": [3],
        "ggml.padding_token_id": [3, -1], "chat_template": ["x", ""],
        "ggml.add_bos_token": [True], "ggml.add_space_prefix": [True],
        "ggml.remove_extra_whitespaces": [True],
    }.get(name, [])  # fmt: skip
    is_bpe = source.field("tokenizer.ggml.model") == "gpt2"
    for value in VALUES:
        changed = with_fields(source, **{name: value})
        if any(value is v or (value == v and type(value) is type(v)) for v in fits):
            assert tokenizer_files(changed)
            continue
        unused = name in (("ggml.scores",) if is_bpe else ("ggml.pre", "ggml.merges"))
        try:
            tokenizer_files(changed)
        except UserError as e:
            words = (
                name, "pre-tokenizer", "has no tokenizer", "is not supported", "for 1 tokens",
                "tokenizer is damaged",
            )  # fmt: skip
            assert any(word in str(e) for word in words) and "\n" not in str(e), (value, str(e))
        else:
            assert unused, value


@pytest.mark.parametrize("name", ["eot_token_id", "eom_token_id"])
def test_ends_of_turns_are_token_ids(source, name):
    for value in VALUES:
        changed = with_fields(source, **{f"ggml.{name}": value})
        if type(value) is int:
            assert gguf_end_ids(changed) == (value,)
        else:
            with pytest.raises(UserError, match=rf"tokenizer\.ggml\.{name} is .* expected a token"):
                gguf_end_ids(changed)


def test_a_template_under_another_name_is_said_not_to_be_used(source):
    """Only `tokenizer.chat_template` is the model's default, as in transformers and llama.cpp."""
    named = {"chat_template.rag": "{{ 1 }}", "chat_template.tool_use": "{{ 2 }}"}
    (note, *_) = unsaid(with_fields(source, chat_template=None, **named))
    assert "tokenizer.chat_template.rag, tokenizer.chat_template.tool_use is not used" in note
    notes = unsaid(with_fields(source, chat_template="{{ 0 }}", **named))
    assert not any("rag" in note for note in notes)


def test_two_rotary_scalings_are_refused(tmp_path):
    config = llm_config(vocab_size=785)
    freqs = np.ones(config["hidden_size"] // config["num_attention_heads"] // 2, np.float32)
    path = write_gguf(
        tmp_path / "a.gguf", config, llm_state(config), extra={"rope_freqs.weight": freqs}
    )
    both = with_fields(Gguf(path))
    both._values["llama.rope.scale_linear"] = SimpleNamespace(contents=lambda: 4.0)
    with pytest.raises(UserError, match=r"rope_freqs\.weight together with llama\.rope\.scaling"):
        both.hf_config()


def test_the_note_is_given_by_a_build(tmp_path):
    """On the way from the file to the user."""
    config = llm_config(vocab_size=785)
    path = write_gguf(tmp_path / "a.gguf", config, llm_state(config))
    reader = gguf.GGUFReader(path)
    assert "tokenizer.chat_template" not in reader.fields
    del reader
    named = with_fields(Gguf(path), **{"chat_template.rag": "{{ 1 }}"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert.language_model.Gguf", lambda _: named)
        notes = make_plan(BuildRequest("minigpt4-vicuna", path, tmp_path / "m")).notes
    assert any("tokenizer.chat_template.rag is not used" in note for note in notes)
