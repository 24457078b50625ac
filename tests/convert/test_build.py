"""convert build: the results for small checkpoints, and for the reference's where they exist."""

import hashlib
import json

import numpy as np
import pytest
from helpers.paths import REFERENCE
from helpers.released_files import (
    VOCAB,
    llm_config,
    llm_state,
    lora_state,
    projection_state,
    save_hf,
    save_pth,
    save_sharded,
)
from safetensors import safe_open
from safetensors.numpy import save_file

from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import Tensors, read_config, read_model_json
from minigpt4_jax.checkpoint.parameters import parameter_shapes


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)


@pytest.mark.smoke
def test_tensors_of_the_vicuna_variant(files, command):
    code, out, err = command(*files.arguments("minigpt4-vicuna"))
    assert code == 0, err
    model = files.folder / "model_a"
    config, t = read_config(model), Tensors(model)
    assert set(t) == set(parameter_shapes(config))
    assert (config.vision.depth, config.vision.image_size, config.vision.heads) == (2, 8, 2)
    assert (config.qformer.queries, config.qformer.cross_every, config.qformer.ffn) == (3, 2, 20)
    assert config.llm.vocab == VOCAB and config.tokenizer.kind == "sentencepiece"
    assert config.end_symbol == "###" and config.prompt_template == "###Human: {} ###Assistant: "
    assert same(t["vit.patch.weight"], files.vit["patch_embed.proj.weight"].reshape(16, 12))
    assert same(t["vit.cls"], files.vit["cls_token"][0, 0])
    assert same(t["vit.pos"], files.vit["pos_embed"][0])
    assert same(t["vit.blocks.1.mlp.up.bias"], files.vit["blocks.1.mlp.fc1.bias"])
    assert same(t["ln_vision.scale"], files.blip2["ln_vision.weight"])
    assert same(t["qformer.query"], files.blip2["query_tokens"][0])
    layer = "Qformer.bert.encoder.layer.0."
    assert same(
        t["qformer.blocks.0.cross.k.weight"], files.blip2[layer + "crossattention.self.key.weight"]
    )
    norm = "Qformer.bert.encoder.layer.1.output_query.LayerNorm.weight"
    assert same(t["qformer.blocks.1.mlp.norm.scale"], files.blip2[norm])
    assert same(
        t["llm.blocks.1.attn.k.weight"], files.llm["model.layers.1.self_attn.k_proj.weight"]
    )
    assert same(t["llm.head.weight"], files.llm["lm_head.weight"])
    assert same(t["projection.weight"], projection_state(12)["llama_proj.weight"])
    assert "block 2" in out and "is not used" in out
    digest = hashlib.sha256((files.folder / "eva.pth").read_bytes()).hexdigest()
    assert read_model_json(model)["sources"]["vision"]["sha256"] == digest


def test_llama2_has_an_identity_ln_vision_and_joins_patches(files, command):
    code, _, err = command(*files.arguments("minigpt4-llama2"))
    assert code == 0, err
    config, t = read_config(files.folder / "model_b"), Tensors(files.folder / "model_b")
    assert config.qformer is None and config.visual_tokens == 4 and config.projection_in == 64
    assert np.all(t["ln_vision.scale"] == 1) and np.all(t["ln_vision.bias"] == 0)


@pytest.mark.parametrize("middle", ["", "default."])
def test_v2_doubles_the_image_and_keeps_lora_in_both_spellings(files, command, middle):
    lora = lora_state(files.llm_config, middle=middle)
    checkpoint = save_pth(files.folder / "c2.pth", projection_state(64) | lora)
    code, text, err = command(
        *files.arguments("minigpt-v2", checkpoint=checkpoint), "--set", "lora.alpha=8"
    )
    assert code == 0, err
    assert "eva.pth is interpolated to 8 x 8, as in the original" in text
    config, t = read_config(files.folder / "model_c"), Tensors(files.folder / "model_c")
    assert config.vision.image_size == 16 and t["vit.pos"].dtype == np.float32
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (2, 8.0, ("q", "v"))
    key = f"llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.{middle}weight"
    assert same(t["llm.blocks.1.attn.v.lora_b"], lora[key])


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_give_the_same_model(files, command, suffix):
    assert command(*files.arguments("minigpt4-vicuna"))[0] == 0
    save_sharded(files.folder / "llm", files.llm, suffix)
    other = files.folder / "other"
    code, _, err = command(*files.arguments("minigpt4-vicuna", out=other))
    assert code == 0, err
    ours, theirs = Tensors(files.folder / "model_a"), Tensors(other)
    assert all(same(ours[n], theirs[n]) for n in ours)
    source = read_model_json(other)["sources"]["llm"]
    assert len(source["files"]) == 2
    for name, digest in source["files"].items():
        assert hashlib.sha256((files.folder / "llm" / name).read_bytes()).hexdigest() == digest


def test_settings_change_the_configuration(files, command):
    sets = {
        "image_size": 6, "vision.depth": 1, "max_text_length": 20, "max_context": 99,
        "end_symbol": "\\n", "prompt_template": "Q {} A", "chat_template": "llama2",
        "llm.rope_theta": 500.0,
    }  # fmt: skip
    code, _, err = command(
        *files.arguments("minigpt4-vicuna"), *(f"--set={k}={v}" for k, v in sets.items())
    )
    assert code == 0, err
    config = read_config(files.folder / "model_a")
    assert (config.vision.image_size, config.vision.depth, config.max_context) == (6, 1, 99)
    assert (config.end_symbol, config.prompt_template) == ("\n", "Q {} A")
    assert (config.max_text_length, config.llm.rope_theta) == (20, 500.0)
    assert Tensors(files.folder / "model_a")["vit.pos"].shape == (10, 16)


def test_a_new_projection_is_seeded_and_bounded(files, command):
    for out, seed in (("x", 1), ("y", 1), ("z", 2)):
        code, text, err = command(
            *files.arguments("minigpt4-vicuna", checkpoint=None, out=files.folder / out, seed=seed)
        )
        assert code == 0 and "projection is new" in text, err
    x, y, z = (Tensors(files.folder / n)["projection.weight"] for n in "xyz")
    assert same(x, y) and not same(x, z)
    assert np.abs(x).max() <= 12**-0.5 and x.std() > 0.1


def test_a_new_projection_can_be_scaled(files, command):
    arguments = files.arguments("minigpt4-vicuna", checkpoint=None, out=files.folder / "x")
    assert command(*arguments)[0] == 0
    smaller = files.arguments("minigpt4-vicuna", checkpoint=None, out=files.folder / "y")
    assert command(*smaller, "--projection-scale=0.25")[0] == 0
    x, y = (Tensors(files.folder / n) for n in "xy")
    changed = {n for n in x if not same(x[n], y[n])}
    assert changed == {"projection.weight", "projection.bias"}
    assert all(same(np.float32(0.25) * x[n], y[n]) for n in changed)


def test_a_trained_projection_is_not_scaled(files, command):
    code, out, err = command(*files.arguments("minigpt4-vicuna"), "--projection-scale=0.25")
    assert code == 0 and "--projection-scale is not used" in out, err
    t = Tensors(files.folder / "model_a")
    assert same(t["projection.weight"], projection_state(12)["llama_proj.weight"])


@pytest.mark.parametrize("factor", ["0", "-1", "nan", "inf", "small"])
def test_invalid_projection_scales_are_refused(files, refused, factor):
    line = refused(*files.arguments("minigpt4-vicuna"), f"--projection-scale={factor}")
    assert "--projection-scale" in line and factor in line


def test_without_vision_the_packaged_encoder_is_used(files, command):
    from convert.sources import packaged_encoder

    code, out, err = command(
        "build", f"--llm={files.folder / 'llm'}", f"--out={files.folder / 'm'}"
    )
    assert code == 0, err
    shipped = packaged_encoder()
    assert f"using the packaged demonstration encoder {shipped.name}" in out
    with safe_open(shipped, framework="np") as file:
        sizes = json.loads(file.metadata()["config"])
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config, t = read_config(files.folder / "m").to_dict(), Tensors(files.folder / "m")
    assert all(values.items() <= config[part].items() for part, values in sizes.items())
    vision = {n for n in t if n.startswith(("vit.", "ln_vision.", "qformer."))}
    assert vision == set(weights) and all(same(t[n], weights[n]) for n in vision)
    assert t["projection.weight"].shape == (16, sizes["qformer"]["hidden"])
    digest = hashlib.sha256(shipped.read_bytes()).hexdigest()
    assert read_model_json(files.folder / "m")["sources"]["vision"]["sha256"] == digest


def test_v2_without_checkpoint_starts_with_lora_that_changes_nothing(files, command):
    code, _, err = command(*files.arguments("minigpt-v2", checkpoint=None), "--set", "lora.rank=2")
    assert code == 0, err
    t = Tensors(files.folder / "model_c")
    assert not t["llm.blocks.0.attn.q.lora_b"].any() and t["llm.blocks.0.attn.q.lora_a"].any()


def test_vision_from_own_files_and_model_directories(files, command):
    assert command(*files.arguments("minigpt4-vicuna"))[0] == 0
    model = files.folder / "model_a"
    t = Tensors(model)
    vision = {n: t[n] for n in t if n.split(".")[0] in ("vit", "qformer", "ln_vision")}
    config = read_config(model).to_dict()
    sizes = json.dumps({k: config[k] for k in ("vision", "qformer")})
    save_file(vision, files.folder / "own.safetensors", metadata={"config": sizes})
    for source in (files.folder / "own.safetensors", model):
        out = files.folder / f"from_{source.name}"
        code, _, err = command(
            "build", f"--vision={source}", f"--llm={files.folder / 'llm'}", f"--out={out}",
            f"--checkpoint={files.folder / 'a.pth'}",
        )  # fmt: skip
        assert code == 0, err
        assert read_config(out) == read_config(model)
        again = Tensors(out)
        assert all(same(t[n], again[n]) for n in t)


def test_a_checkpoint_with_unfrozen_vision_replaces_the_original(files, command):
    changed = {
        "ln_vision.weight": np.full(16, 3, np.float32),
        "query_tokens": np.ones((1, 3, 12), np.float32),
    }
    changed["visual_encoder.blocks.0.norm1.bias"] = np.full(16, 5, np.float32)
    save_pth(files.folder / "a.pth", projection_state(12) | changed)
    code, out, err = command(*files.arguments("minigpt4-vicuna"))
    assert code == 0 and "3 vision parameters" in out, err
    t = Tensors(files.folder / "model_a")
    assert np.all(t["ln_vision.scale"] == 3) and np.all(t["qformer.query"] == 1)
    assert np.all(t["vit.blocks.0.norm1.bias"] == 5)


def test_vicuna_delta_with_one_token_more(files, command, tmp_path):
    more = llm_config(vocab_size=VOCAB + 1)
    delta = llm_state(more, seed=9)
    for key in list(delta):
        if "rotary" in key:
            del delta[key]  # buffers may be in one of the two only
    save_hf(tmp_path / "delta", more, delta)
    code, _, err = command(*files.arguments("minigpt4-vicuna", llm_delta=tmp_path / "delta"))
    assert code == 0, err
    t = Tensors(files.folder / "model_a")
    assert read_config(files.folder / "model_a").llm.vocab == VOCAB + 1
    base, more_rows = files.llm["lm_head.weight"], delta["lm_head.weight"]
    assert same(t["llm.head.weight"][:-1], base + more_rows[:-1])  # float16, rounded once
    assert same(t["llm.head.weight"][-1], more_rows[-1])
    key = "model.layers.0.mlp.up_proj.weight"
    assert same(t["llm.blocks.0.mlp.up.weight"], files.llm[key] + delta[key])


def test_llm_dtype_changes_matrices_only(files, command):
    assert command(*files.arguments("minigpt4-vicuna", llm_dtype="bfloat16"))[0] == 0
    t = Tensors(files.folder / "model_a")
    assert t["llm.embed"].dtype.name == "bfloat16" and t["llm.norm.scale"].dtype == np.float16
    assert t["vit.cls"].dtype == np.float16


@pytest.mark.parametrize(
    ("change", "note", "tied"),
    [
        ("equal", "ties it", True),
        ("differs", "so both are kept", False),
        ("alone", "is the embedding too", True),
    ],
)
def test_whether_embeddings_are_tied_is_decided_by_the_file(
    files, command, tmp_path, change, note, tied
):
    config, state = files.llm_config | {"tie_word_embeddings": True}, dict(files.llm)
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    if change == "equal":
        state[head] = state[embed]
    if change == "alone":
        del state[embed]
    save_hf(tmp_path / "tied", config, state)
    code, out, err = command(*files.arguments("minigpt4-vicuna", llm=tmp_path / "tied"))
    assert code == 0 and note in out, err
    tensors = Tensors(files.folder / "model_a")
    assert read_config(files.folder / "model_a").llm.tie == tied
    assert ("llm.head.weight" in tensors) == (not tied)
    assert same(tensors["llm.embed"], state[head if change == "alone" else embed])
    assert tied or same(tensors["llm.head.weight"], state[head])


@pytest.mark.parametrize("vocab, kept", [(VOCAB, {}), (VOCAB + 1, {"<pad>": VOCAB})])
def test_an_added_token_without_a_row_is_left_out(files, command, tmp_path, vocab, kept):
    config = llm_config(vocab_size=vocab)
    folder = save_hf(tmp_path / "llm2", config, llm_state(config))
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": VOCAB}))
    code, out, err = command(*files.arguments("minigpt4-vicuna", llm=folder))
    assert code == 0, err
    assert ("<pad> left out" in out) == (not kept)
    copied = files.folder / "model_a" / "tokenizer" / "added_tokens.json"
    assert json.loads(copied.read_text()) == kept


# --- the reference checkpoints --------------------------------------------------------------------

CASES = {
    "a": ("minigpt4-vicuna", "a_minigpt4_vicuna", ["--set=image_size=56", "--set=qformer.heads=4"]),
    "b": ("minigpt4-llama2", "b_minigpt4_llama2", ["--set=image_size=56"]),
    "c": ("minigpt-v2", "c_minigptv2", ["--set=image_size=112"]),
}


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs ../shared/reference")
@pytest.mark.parametrize("case", CASES)
def test_reference_checkpoints_give_the_originals_visual_tokens(case, command, tmp_path):
    import jax.numpy as jnp

    variant, checkpoint, settings = CASES[case]
    at = REFERENCE / "checkpoints"
    code, _, err = command(
        "build", f"--variant={variant}", f"--vision={at / 'eva_vit_g.pth'}",
        *([f"--qformer={at / 'blip2_pretrained_flant5xxl.pth'}"] if case == "a" else []),
        f"--llm={at / 'llama'}", f"--checkpoint={at / checkpoint}.pth", f"--out={tmp_path / 'm'}",
        "--set=vision.heads=4", *settings,
    )  # fmt: skip
    assert code == 0, err
    model, _ = load_model(tmp_path / "m", "float32")
    pixels = np.load(REFERENCE / "dumps" / f"{case}_pixels.npz")["pixel_values"]
    got = model.encode(jnp.asarray(np.moveaxis(pixels, 1, -1)[:, None]))
    want = np.load(REFERENCE / "dumps" / f"{case}_vision.npz")["inputs_llama"]
    np.testing.assert_allclose(np.asarray(got).reshape(want.shape), want, atol=2e-5)


def test_resampled_positions_are_noted(files, command):
    code, text, err = command(*files.arguments("minigpt4-vicuna"), "--set=image_size=6")
    assert code == 0, err
    assert "interpolated to 3 x 3; the encoder was not trained at this size" in text
    again = files.arguments("minigpt4-vicuna", out=files.folder / "same")
    assert "interpolated" not in command(*again, "--set=image_size=8")[1]
