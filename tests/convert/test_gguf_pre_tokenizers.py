"""Every known value of GGUF's tokenizer.ggml.pre gives the ids of transformers' tokenizer."""

import json
from functools import cache

import pytest

from convert.formats.gguf_tokenizer import PRE_TOKENIZERS, _byte_level

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "world", "Hello world! 123 don't   x", "I'LL we'RE it's YOU'D", "  two  spaces ", "a\n\n b\t\r\n  c\n",
    "12345 1,234.5 x1y22 ²³ Ⅷ ٣٤", "Café déjà vu. Ünïcödé", "x_y+z==1!! <a>b</a> $5^2|~`",
    "日本語 text 한글 🐈", "aBcDEFgHi HTMLParser iPhone15Pro", "path/to//file.txt\n/end/\n", "#?!\n\n?? \n.",
    "...'s 'sa ''S", " \u00a0x\u3000y",
]  # fmt: skip
DECOMPOSED = ["Cafe\u0301 de\u0301ja\u0300", "\u1112\u1161\u11ab"]  # not in the normal form NFC
UNREACHED = "world"  # a word of the vocabulary that no merges make


@cache
def trained():
    """(tokens, merges) of BPE over whole texts, so that ids show every place where a text is split."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    model.pre_tokenizer = byte_level(add_prefix_space=False, use_regex=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=byte_level.alphabet(), show_progress=False
    )
    decompose = tokenizers.normalizers.NFD().normalize_str
    texts = [*TEXTS, *DECOMPOSED, *map(decompose, TEXTS)]
    words = [word for text in texts for word in text.split()]
    model.train_from_iterator([t for t in texts + words if UNREACHED not in t] * 2, trainer)
    values = json.loads(model.to_str())["model"]
    assert UNREACHED not in values["vocab"]
    tokens = sorted(values["vocab"], key=values["vocab"].get)
    return [*tokens, UNREACHED], [tuple(merge) for merge in values["merges"]]


def bpe(**options):
    tokens, merges = trained()
    return {"vocab": {t: i for i, t in enumerate(tokens)}, "merges": merges} | options


def of_class(name):
    """The tokenizer of a class of transformers."""
    return getattr(transformers, name)(**bpe())._tokenizer


def gpt2():
    return of_class("GPT2Tokenizer")


def gpt_neox():
    return of_class("GPTNeoXTokenizer")


def cohere():
    return of_class("CohereTokenizer")


def starcoder():
    """Digits alone, then GPT-2's words, as in Cohere's class, but without a normal form."""
    model = cohere()
    model.normalizer = tokenizers.normalizers.Sequence([])
    return model


def qwen2():
    return of_class("Qwen2Tokenizer")


def llama3(ignore_merges=True):
    """As transformers converts a file of tiktoken; Llama 3 takes whole words before merges."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    pre = tokenizers.pre_tokenizers
    model = tokenizers.Tokenizer(tokenizers.models.BPE(**bpe(ignore_merges=ignore_merges)))
    split = pre.Split(tokenizers.Regex(TikTokenConverter().pattern), "isolated")
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre.Sequence([split, byte_level])
    return model


def smaug():
    return llama3(ignore_merges=False)


# what makes transformers' tokenizer -> values of tokenizer.ggml.pre
REFERENCES = {
    gpt2: ("gpt-2",),
    gpt_neox: ("mpt", "olmo"),
    starcoder: ("smollm", "starcoder", "refact", "codeshell"),
    cohere: ("command-r",),
    qwen2: ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"),
    llama3: ("llama-bpe", "llama3", "llama-v3", "falcon3"),
    smaug: ("smaug-bpe",),
}
# those of Qwen2 that may have another normal form than Qwen2's class
UNKNOWN_FORM = REFERENCES[qwen2][1:]
# Those that no class of transformers has: text -> pieces.
CUTS = {
    "tekken": {
        "Hello world! 123": ["Hello", " world", "!", " ", "1", "2", "3"],
        "HTMLParser iPhone15Pro": ["HTMLParser", " i", "Phone", "1", "5", "Pro"],
        "helloWorld don't": ["hello", "World", " don", "'t"],
        "path//to/\n/x": ["path", "//", "to", "/\n/", "x"],
    },
    "default": {
        "Hello world! 123": ["Hello", " world", "!", " ", "123"],
        "don't 12345 $5": ["don", "'", "t", " ", "123", "45", " ", "$", "5"],
    },
}


class Source:
    """A GGUF file with this pre-tokenizer."""

    path = "x.gguf"

    def __init__(self, pre):
        merges = [" ".join(merge) for merge in trained()[1]]
        self.fields = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}

    def field(self, name, default=None):
        return self.fields.get(name, default)


def made(pre):
    tokens, _ = trained()
    return tokenizers.Tokenizer.from_str(_byte_level(Source(pre), tokens, [1] * len(tokens)))


def ids(tokenizer, texts):
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


@pytest.mark.parametrize(
    ("make", "pre"), [(make, pre) for make, names in REFERENCES.items() for pre in names]
)
def test_ids_are_those_of_transformers(make, pre):
    ours, theirs = made(pre), make()
    assert ids(ours, TEXTS) == ids(theirs, TEXTS)
    if pre not in UNKNOWN_FORM:
        assert ids(ours, DECOMPOSED) == ids(theirs, DECOMPOSED)


@pytest.mark.parametrize("pre", CUTS)
def test_cuts_of_those_that_transformers_has_no_class_for(pre):
    tokenizer = made(pre).pre_tokenizer
    for text, pieces in CUTS[pre].items():
        assert [text[a:b] for _, (a, b) in tokenizer.pre_tokenize_str(text)] == pieces


def test_every_value_has_a_comparison():
    assert {pre for names in REFERENCES.values() for pre in names} | {*CUTS} == {*PRE_TOKENIZERS}
    # these texts tell the references apart; otherwise equal ids would show nothing
    assert len({str(ids(make(), TEXTS + DECOMPOSED)) for make in REFERENCES}) == len(REFERENCES)
