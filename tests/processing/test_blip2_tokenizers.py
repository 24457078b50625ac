"""Ids of texts by BLIP-2's three tokenizers, against the transformers that LAVIS pins."""

import pytest
from helpers import blip2_reference as reference
from helpers.blip2_reference import NEEDS_BLIP2

from minigpt4_jax.processing.clean_up_spaces import clean_up_spaces
from minigpt4_jax.processing.tokenizer import load_tokenizer


@NEEDS_BLIP2
@pytest.mark.parametrize(
    ("name", "folder", "kind"),
    [
        ("opt", "opt", "hf"),
        ("flant5", "flan-t5", "hf"),
        ("bert (cut vocabulary)", "bert-base-uncased", "bert"),
        ("bert (full vocabulary)", "bert-base-uncased-full", "bert"),
    ],
)
def test_ids_and_texts(name, folder, kind):
    tokenizer = load_tokenizer(reference.CHECKPOINTS / folder, kind)
    _, cases = reference.dump("tokenizers")
    texts = cases[name]["texts"]
    assert {" ", "[DEC] [SEP] </s> <pad>"} <= {case["text"] for case in texts}
    for case in texts:
        assert tokenizer.encode(case["text"]) == case["ids_no_special"], case["text"]
        assert clean_up_spaces(tokenizer.decode(case["ids"])) == case["decoded"], case["text"]


@NEEDS_BLIP2
def test_a_tokenizer_json_has_the_rules():
    """Directories written by transformers have these in their files, and drop the space at the end."""
    t5 = load_tokenizer(reference.CHECKPOINTS / "hf/flan-t5", "hf")
    assert t5.encode("a dog ") == t5.encode("a dog")
    opt = load_tokenizer(reference.CHECKPOINTS / "hf/opt", "hf")
    space = opt.encode(" ")
    assert opt.encode("a </s> a") == opt.encode("a") + space + [2] + opt.encode(" a")
