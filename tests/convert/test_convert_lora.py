"""LoRA in `python -m convert`: added to any variant, read, merged and exported."""

import numpy as np
import pytest
from helpers.released_files import lora_state, projection_state, random_state, save_pth

from convert.formats.readers import open_file
from minigpt4_jax.checkpoint.loader import open_tensors
from minigpt4_jax.checkpoint.model_directory import Tensors, read_config

WIDE = {"mlp.down_proj": (16, 24), "mlp.gate_proj": (24, 16), "self_attn.o_proj": (16, 16)}


def every_kind(files, middle=""):
    """LoRA of rank 2 on q, v, o, gate and down, as peft names it."""
    shapes = {}
    for i in range(files.llm_config["num_hidden_layers"]):
        for name, (n_out, n_in) in WIDE.items():
            b = f"llama_model.base_model.model.model.layers.{i}.{name}.lora_"
            shapes |= {f"{b}A.{middle}weight": (2, n_in), f"{b}B.{middle}weight": (n_out, 2)}
    return random_state(shapes, seed=6) | lora_state(files.llm_config, middle=middle)


@pytest.mark.parametrize("middle", ["", "default."])
def test_exported_lora_is_bit_exact(files, command, refused, middle):
    state = projection_state(12) | every_kind(files, middle)
    path, out = save_pth(files.folder / "l.pth", state), files.folder / "m"
    line = refused(*files.arguments("minigpt4-vicuna", checkpoint=path, out=out))
    assert "lora_A" in line and "--variant=minigpt-v2" in line and "lora.alpha=" in line
    build = files.arguments("minigpt4-vicuna", checkpoint=path, out=out)
    code, _, err = command(*build, "--set=lora.alpha=8")
    assert code == 0, err
    lora = read_config(out).lora
    assert (lora.rank, lora.alpha, lora.targets) == (2, 8.0, ("q", "v", "o", "gate", "down"))
    back = files.folder / "back.pth"
    assert command("export", f"--model={out}", f"--out={back}")[0] == 0
    got = open_file(back)
    assert set(got.tensors) == {
        key.replace("default.", "") for key in state
    }  # peft 0.2, as the original
    for key, want in state.items():
        assert got.read(key.replace("default.", "")).tobytes() == want.tobytes()


def test_a_model_directory_as_checkpoint_brings_its_alpha(files, command):
    path = save_pth(files.folder / "l.pth", projection_state(12) | every_kind(files))
    one, two = files.folder / "one", files.folder / "two"
    build = files.arguments("minigpt4-vicuna", checkpoint=path, out=one)
    assert command(*build, "--set=lora.alpha=8", "--set=lora.dropout=0.1")[0] == 0
    code, _, err = command(*files.arguments("minigpt4-vicuna", checkpoint=one, out=two))
    assert code == 0, err
    assert read_config(two).lora == read_config(one).lora
    a, b = Tensors(one), Tensors(two)
    assert all(a[n].tobytes() == b[n].tobytes() for n in a)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_new_adapters_for_a_variant_without_lora(files, command, checkpoint):
    changes = {} if checkpoint else {"checkpoint": None}
    line = files.arguments("minigpt4-vicuna", **changes)
    line += ["--set=lora.rank=3", "--set=lora.targets=k,up"]
    code, text, err = command(*line)
    assert code == 0, err
    assert "LoRA is new" in text
    assert ("projection is new" in text) != checkpoint
    model = files.folder / "model_a"
    t = Tensors(model)
    names = {n for n in t if ".lora_" in n}
    assert names == {
        f"llm.blocks.{i}.{m}.lora_{ab}" for i in range(2) for m in ("attn.k", "mlp.up")
        for ab in "ab"
    }  # fmt: skip
    for n in names:
        assert t[n].any() == n.endswith("a") and np.abs(t[n]).max() <= t[n].shape[-1] ** -0.5
    table = command("inspect", model)[1]
    assert "rank 3, alpha 16, on k, up, dropout 0.05" in table and "new, not trained" in table


def test_settings_that_do_not_fit_are_named(files, refused):
    path = save_pth(files.folder / "l.pth", projection_state(12) | every_kind(files))
    build = files.arguments("minigpt4-vicuna", checkpoint=path)
    assert "lora_A" in refused(*build, "--set=lora.targets=q")
    assert "(2, 16)" in refused(*build, "--set=lora.rank=4")
    assert "expected some of q, k, v" in refused(*build, "--set=lora.targets=q,w")


def test_merge_and_unmerge(files, command, refused):
    path = save_pth(files.folder / "l.pth", projection_state(12) | every_kind(files))
    names = ("one", "merged", "half", "apart")
    one, merged, half, apart = (files.folder / name for name in names)
    build = files.arguments("minigpt4-vicuna", checkpoint=path, out=one)
    assert command(*build, "--set=lora.alpha=8")[0] == 0
    code, text, err = command("merge", f"--model={one}", f"--out={merged}")
    assert code == 0 and "q, v, o, gate, down merged" in text, err
    a, m = Tensors(one), Tensors(merged)
    assert read_config(merged).lora is None and not any(".lora_" in n for n in m)
    open_tensors(merged, read_config(merged))
    for name in m:
        stem = name.removesuffix(".weight")
        if f"{stem}.lora_a" in a:
            want = (
                a[name].astype(float) + 4 * a[f"{stem}.lora_b"].astype(float) @ a[f"{stem}.lora_a"]
            )
            np.testing.assert_allclose(m[name], want, atol=1e-6)
        else:
            assert m[name].tobytes() == a[name].tobytes()
    command_line = ["unmerge", f"--model={merged}", f"--lora={one}", f"--out={apart}"]
    assert command(*command_line)[0] == 0
    assert read_config(apart).lora == read_config(one).lora
    b = Tensors(apart)
    assert set(b) == set(a)
    for name in a:
        np.testing.assert_allclose(b[name].astype(float), a[name].astype(float), atol=1e-6)
    assert command("merge", f"--model={one}", f"--out={half}", "--dtype=float16")[0] == 0
    assert Tensors(half).dtype("llm.blocks.0.attn.q.weight") == "F16"
    table = command("inspect", merged)[1]
    assert f"merged     {one}" in table

    again = files.folder / "again"
    assert "no LoRA to merge" in refused("merge", f"--model={merged}", f"--out={again}")
    line = refused("unmerge", f"--model={one}", f"--lora={one}", f"--out={again}")
    assert "LoRA of its own" in line
    line = refused("unmerge", f"--model={merged}", f"--lora={merged}", f"--out={again}")
    assert "no LoRA" in line
    rounded = files.folder / "rounded"
    build = files.arguments("minigpt4-vicuna", checkpoint=path, out=rounded)
    assert command(*build, "--set=lora.alpha=8", "--quantize=int8")[0] == 0
    assert "int8" in refused("merge", f"--model={rounded}", f"--out={again}")
    assert not again.exists()
