"""The tokenizers, against what the original's own tokenizer returned."""

import json
import shutil
import subprocess
import sys

import pytest
from helpers.paths import FIXTURES, ROOT, SHARED

from minigpt4_jax.errors import UserError
from minigpt4_jax.processing.tokenizer import load_tokenizer

LLAMA = SHARED / "assets" / "llama_tokenizer.model"

# SPEC section 5, the real LLaMA vocabulary
LLAMA_IDS = {
    "###": [835],
    "sky###": [14744, 2277, 29937],
    "a cat\n": [263, 6635, 13],
    "a cat</s>": [263, 6635, 2],
    "###Human: <Img>": [835, 29950, 7889, 29901, 529, 25518, 29958],
    "</Img> hi###Assistant: ": [1533, 25518, 29958, 7251, 2277, 29937, 7900, 22137, 29901, 29871],
    "</Img> [vqa] what?  [/INST]": [
        1533, 25518, 29958, 518, 29894, 25621, 29962, 825, 29973, 29871, 518, 29914, 25580, 29962,
    ],
    "{<10><20><30><100>}</s>": [
        426, 29966, 29896, 29900, 5299, 29906, 29900, 5299, 29941, 29900, 5299,
        29896, 29900, 29900, 29958, 29913, 2,
    ],
}  # fmt: skip


def small():
    return load_tokenizer(FIXTURES / "llama_tokenizer")


def real(tmp_path):
    if not LLAMA.exists():
        pytest.skip("the real LLaMA tokenizer is not here (its licence forbids shipping it)")
    shutil.copyfile(LLAMA, tmp_path / "tokenizer.model")
    return load_tokenizer(tmp_path)


def check_cases(tokenizer, reference):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        reference["bos"], reference["eos"], reference["pad_id"],
    )  # fmt: skip
    for case in reference["cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert tokenizer.encode(case["text"], bos=True) == case["ids_bos"], case["text"]
        assert tokenizer.decode(case["ids_bos"]) == case["decoded"]
        assert tokenizer.decode(case["ids_bos"], skip_special=False) == case["decoded_raw"]


def test_small_model_equals_the_original():
    check_cases(
        small(), json.loads((FIXTURES / "tokenizer_cases.json").read_text(encoding="utf-8"))
    )


def test_real_model_equals_the_original(tmp_path):
    tokenizer = real(tmp_path)
    dump = SHARED / "reference" / "dumps" / "tokenizer_llama32000.json"
    check_cases(tokenizer, json.loads(dump.read_text(encoding="utf-8")))
    for text, ids in LLAMA_IDS.items():
        assert tokenizer.encode(text) == ids, text
    assert tokenizer.encode("<s>[INST] <Img>", bos=True)[:3] == [1, 1, 518]
    assert (tokenizer.pad_id, tokenizer.vocab_size, tokenizer.bos) == (3997, 32000, "<s>")


def test_unknown_token_between_words():
    """As the original's generations with padded rows are written (a_generate, greedy_eos)."""
    tokenizer = small()
    assert tokenizer.decode([1, 58, 237, 0], skip_special=False) == "<s> 7\ufffd<unk>"
    assert tokenizer.decode([1, 58, 237, 0]) == "7\ufffd"
    assert tokenizer.decode([276, tokenizer.pad_id, 276]) == tokenizer.decode([276, 276])


def test_ids_outside_the_vocabulary_are_left_out():
    assert small().decode([276, 785, -1, 99999, 276]) == small().decode([276, 276])


def test_added_pad_token_of_vicuna_v0(tmp_path):
    shutil.copytree(FIXTURES / "llama_tokenizer", tmp_path / "t")
    (tmp_path / "t" / "added_tokens.json").write_text('{"[PAD]": 785}')
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.vocab_size == 786
    assert tokenizer.encode("a [PAD] a") == [276, 785, 276]
    assert tokenizer.decode([276, 785, 276]) == "a [PAD] a"


def test_special_token_objects_say_whether_space_stays(tmp_path):
    """Llama-2-chat spells its special tokens as objects with lstrip false: space stays there."""
    shutil.copytree(FIXTURES / "llama_tokenizer", tmp_path / "t")
    token = {"content": "</s>", "lstrip": False, "rstrip": True}
    (tmp_path / "t" / "special_tokens_map.json").write_text(json.dumps({"eos_token": token}))
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.encode("a </s> a") == [276, 734, 2, 276]
    assert small().encode("a </s> a") == [276, 2, 276]


@pytest.mark.parametrize(
    "content", [b"", b"<html><body>404</body></html>", b"version https://git-lfs"]
)
def test_damaged_model_file(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_truncated_model_file(tmp_path):
    whole = (FIXTURES / "llama_tokenizer" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[:5000])
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not a directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path, kind="hf")


@pytest.fixture(scope="module")
def bpe_directory(tmp_path_factory):
    """A byte-level BPE tokenizer as SmolLM2 and Qwen have it, made here."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<|im_start|>", "<|im_end|>"], vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator(["a red circle above a blue square"] * 10, trainer)
    directory = tmp_path_factory.mktemp("bpe")
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
    }))  # fmt: skip
    return directory


def test_hf_tokenizer(bpe_directory):
    tokenizer = load_tokenizer(bpe_directory)
    assert (tokenizer.kind, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == ("hf", 0, 1, 1)
    ids = tokenizer.encode(" a red  circle .\n")
    assert tokenizer.decode(ids) == " a red  circle .\n"
    assert tokenizer.encode("") == []
    assert tokenizer.encode("a red", bos=True) == [0, *tokenizer.encode("a red")]
    chat = "<|im_start|>user"
    assert tokenizer.encode(chat, bos=True) == tokenizer.encode(chat)  # it begins with BOS already
    assert tokenizer.decode([0, *ids, 1, 10**6]) == " a red  circle .\n"
    assert tokenizer.decode([0, 1], skip_special=False) == "<|im_start|><|im_end|>"


def test_damaged_hf_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("<html>")
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def test_llama_3_style_directory_falls_back_to_tokenizer_json(bpe_directory, tmp_path):
    shutil.copytree(bpe_directory, tmp_path / "t")
    (tmp_path / "t" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's format
    assert load_tokenizer(tmp_path / "t").kind == "hf"


def test_llama_path_does_not_import_transformers():
    code = (
        "import sys; from minigpt4_jax.processing.tokenizer import load_tokenizer; "
        "load_tokenizer(sys.argv[1]); sys.exit('transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(FIXTURES / "llama_tokenizer")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
