"""convert pack: a trained model and its base in one directory; bases that were moved."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tiny
from helpers.paths import TOKENIZER

import minigpt4_jax
from minigpt4_jax.checkpoint.loader import load_model, open_tensors
from minigpt4_jax.checkpoint.model_directory import (
    Tensors,
    fingerprint,
    model_chain,
    read_config,
    read_model_json,
)
from minigpt4_jax.checkpoint.parameters import parameter_shapes, part_of
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.cli import batch, common
from minigpt4_jax.config import LoraConfig
from minigpt4_jax.errors import UserError

TOKENIZER_FILES = {path.name: path for path in TOKENIZER.iterdir()}
LORA = LoraConfig(rank=2, alpha=8.0, targets=("q", "down"))


@pytest.fixture
def base(tmp_path):
    return tiny.write_model(tmp_path / "models" / "base")


def train(base, out, *, seed=1, lora=LORA, **options):
    """Write what a run on `base` writes: another projection, and LoRA if given."""
    rng = np.random.default_rng(seed)
    config = dataclasses.replace(read_config(base), lora=lora)
    trained = {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
        if part_of(name) in ("projection", "lora")
    }
    sources = {"training": {"base": str(base), "steps": seed}}
    return write_model(out, config, trained.items(), base=base, sources=sources, **options)


@pytest.fixture
def trained(base, tmp_path):
    return train(base, tmp_path / "runs" / "model")


@pytest.mark.smoke
def test_everything_is_copied_and_the_result_can_be_moved(base, trained, command, tmp_path):
    second = train(trained, tmp_path / "runs" / "second", seed=2)  # based on a trained model
    expected = {n: t.copy() for n, t in Tensors(second).items()}
    out = tmp_path / "packed"
    code, text, err = command("pack", f"--model={second}", f"--out={out}")
    assert code == 0 and "LoRA on q, down kept" in text, err
    moved = out.rename(tmp_path / "elsewhere")
    base.parent.rename(tmp_path / "gone")
    second.parent.rename(tmp_path / "gone too")
    packed = Tensors(moved)
    assert model_chain(moved) == [moved] and read_config(moved).lora == LORA
    assert set(packed) == set(expected)
    assert all(packed[n].tobytes() == expected[n].tobytes() for n in expected)
    sources = read_model_json(moved)["sources"]
    assert sources["training"]["steps"] == 2 and sources["packed"] == {"file": str(second)}
    assert (moved / "tokenizer" / "tokenizer.model").is_file()


def test_merged_lora_is_in_the_weights(base, trained, command, tmp_path):
    out = tmp_path / "packed"
    code, text, err = command("pack", f"--model={trained}", f"--out={out}", "--merge-lora")
    assert code == 0 and "merged" in text, err
    packed, parts = Tensors(out), Tensors(trained)
    assert read_config(out).lora is None and not any(".lora_" in name for name in packed)
    open_tensors(out, read_config(out))
    for name in packed:
        stem = name.removesuffix(".weight")
        expected = parts[name].astype(np.float64)
        if f"{stem}.lora_a" in parts:
            expected += 4 * parts[f"{stem}.lora_b"].astype(float) @ parts[f"{stem}.lora_a"]
        np.testing.assert_allclose(packed[name], expected, atol=1e-5)


@pytest.mark.parametrize("merge", [True, False])
def test_dtype_applies_to_matrices_of_frozen_parts(trained, command, tmp_path, merge):
    out = tmp_path / "packed"
    options = ["--merge-lora"] if merge else []
    code, _, err = command(
        "pack", f"--model={trained}", f"--out={out}", "--dtype=bfloat16", *options
    )
    assert code == 0, err
    dtypes = {name: Tensors(out).dtype(name) for name in Tensors(out)}
    rounded = {"llm.embed", "llm.blocks.0.attn.q.weight", "vit.blocks.1.mlp.fc1.weight"}
    assert {name for name in rounded if name in dtypes} >= {"llm.embed"}
    assert all(dtypes[name] == "BF16" for name in rounded & dtypes.keys())
    assert dtypes["projection.weight"] == dtypes["llm.norm.scale"] == "F32"
    assert all(d == "F32" for n, d in dtypes.items() if ".lora_" in n)


def test_a_base_that_was_moved(base, trained, command, refused, tmp_path):
    recorded = read_model_json(trained)
    assert recorded["base"] == "../../models/base"
    assert recorded["base_fingerprint"] == fingerprint(base)
    before = {n: t.copy() for n, t in Tensors(trained).items()}
    (tmp_path / "far" / "away" / "from").mkdir(parents=True)
    moved = base.rename(tmp_path / "far" / "away" / "from" / "here")
    line = refused("inspect", trained)
    assert str(base) in line and "'../../models/base'" in line and "does not exist" in line
    assert f"convert pack --model={trained} --base=DIR --out=NEW" in line
    assert "load(base=...)" in line

    out = tmp_path / "packed"
    code, _, err = command("pack", f"--model={trained}", f"--base={moved}", f"--out={out}")
    assert code == 0, err
    assert all(Tensors(out)[n].tobytes() == before[n].tobytes() for n in before)


def test_every_command_takes_the_place_of_a_base_that_was_moved(base, trained, command, tmp_path):
    moved = tmp_path / "moved"
    for folder in ("before", "after"):
        place = [] if folder == "before" else [f"--base={base.rename(moved)}"]
        (out := tmp_path / folder).mkdir()
        for words in (
            ["export", f"--model={trained}", f"--out={out}/trained.pth"],
            ["merge", f"--model={trained}", f"--out={out}/merged"],
            ["unmerge", f"--model={out}/merged", f"--lora={trained}", f"--out={out}/unmerged"],
        ):
            code, _, err = command(*words, *place)
            assert code == 0, err
    files = [tmp_path / folder / "trained.pth" for folder in ("before", "after")]
    assert files[0].read_bytes() == files[1].read_bytes()
    for name in ("merged", "unmerged"):
        before, after = (Tensors(tmp_path / folder / name) for folder in ("before", "after"))
        assert set(before) == set(after)
        assert all(before[n].tobytes() == after[n].tobytes() for n in before)
    code, text, _ = command("inspect", trained, f"--base={moved}", "--json")
    description = json.loads(text)
    assert code == 0 and description["base"] == [str(moved)]
    assert description["usage"]["template"]["ids"]
    (line,) = description["usage"]["commands"].values()
    assert f"pack --model={trained} --base={moved} --out=" in line


def test_a_model_is_loaded_with_a_base_that_has_moved(base, trained, tmp_path):
    before = Tensors(trained)["llm.embed"].copy()
    moved = base.rename(tmp_path / "moved")
    options = ["--input=rows", "--output=out", "--dtype=float32"]
    with pytest.raises(UserError, match=rf"name its new place with --base={moved} "):
        common.load_model(batch.parse([f"--model={trained}", *options]))
    module, _ = load_model(trained, base=moved)
    assert (np.asarray(module.llm.embed[...]) == before).all()
    model = common.load_model(batch.parse([f"--model={trained}", f"--base={moved}", *options]))
    assert model.config.lora == LORA
    other = tiny.write_model(tmp_path / "other", seed=5)
    with pytest.raises(UserError, match="other: is another model"):
        minigpt4_jax.load(trained, base=other)


def test_a_base_nearby_is_found_by_its_fingerprint(base, trained, refused):
    other = tiny.write_model(base.parent.parent / "other", seed=5)
    moved = base.rename(base.parent.parent / "renamed")
    line = refused("inspect", trained)
    assert f"--base={moved} " in line and "recorded fingerprint" in line and str(other) not in line


def test_another_model_as_base_is_refused(base, trained, refused, tmp_path):
    other = tiny.write_model(tmp_path / "other", seed=5)
    out = tmp_path / "packed"
    line = refused("pack", f"--model={trained}", f"--base={other}", f"--out={out}")
    assert "another model" in line and fingerprint(base) in line and fingerprint(other) in line
    line = refused("pack", f"--model={base}", f"--base={other}", f"--out={out}")
    assert "has no base" in line
    base.rename(tmp_path / "kept")
    other.rename(base)  # where the recorded path leads
    line = refused("pack", f"--model={trained}", f"--out={out}")
    assert "another model" in line and "base_fingerprint" in line
    with pytest.raises(UserError, match="another model"):
        open_tensors(trained, read_config(trained))
    assert not out.exists()


def test_directories_of_earlier_versions_have_no_fingerprint(base, trained, command, tmp_path):
    document = read_model_json(trained)
    del document["base_fingerprint"]
    (trained / "model.json").write_text(json.dumps(document))
    moved = base.rename(tmp_path / "moved")
    out = tmp_path / "packed"
    code, _, err = command("pack", f"--model={trained}", f"--base={moved}", f"--out={out}")
    assert code == 0, err
    tiny.write_model(base, seed=5)
    assert set(Tensors(trained)) == set(Tensors(out))


def test_refusals_leave_nothing(base, trained, refused, tmp_path, monkeypatch):
    before = {p.name for p in tmp_path.iterdir()}
    out = tmp_path / "packed"
    line = refused("pack", f"--model={base}", f"--out={out}", "--merge-lora")
    assert "has no LoRA" in line
    assert "exists" in refused("pack", f"--model={trained}", f"--out={base}")
    with monkeypatch.context() as patch:
        patch.setattr("convert.output.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        assert "disk is full" in refused("pack", f"--model={trained}", f"--out={out}")
    tensors = dict(Tensors(trained).items())
    tensors["projection.bias"] = np.full_like(tensors["projection.bias"], np.nan)
    write_model(tmp_path / "nan", read_config(trained), tensors.items(), tokenizer=TOKENIZER_FILES)
    line = refused("pack", f"--model={tmp_path / 'nan'}", f"--out={out}")
    assert "projection.bias" in line and "NaN" in line
    assert {p.name for p in tmp_path.iterdir()} == before | {"nan"}
    # a value that is too large for float16
    tensors = dict(Tensors(base).items())
    tensors["llm.embed"] = np.full_like(tensors["llm.embed"], 1e6)
    write_model(tmp_path / "large", read_config(base), tensors.items(), tokenizer=TOKENIZER_FILES)
    line = refused("pack", f"--model={tmp_path / 'large'}", f"--out={out}", "--dtype=float16")
    assert "llm.embed in float16" in line and not out.exists()


def test_quantized_models_are_copied_as_they_are(base, tmp_path, command, refused):
    from minigpt4_jax.checkpoint.quantized_tensors import quantize_tensors

    config = dataclasses.replace(read_config(base), quantize="int8")
    rounded = write_model(
        tmp_path / "int8",
        config,
        quantize_tensors(Tensors(base).items(), "int8"),
        tokenizer=TOKENIZER_FILES,
    )
    model, out = train(rounded, tmp_path / "run"), tmp_path / "packed"
    for option in ("--dtype=bfloat16", "--merge-lora"):
        assert "quantized to int8" in refused("pack", f"--model={model}", f"--out={out}", option)
    code, _, err = command("pack", f"--model={model}", f"--out={out}")
    assert code == 0, err
    packed, parts = Tensors(out), Tensors(model)
    assert set(packed) == set(parts)
    assert all(packed[n].tobytes() == parts[n].tobytes() for n in parts)


@pytest.mark.parametrize("place", ["itself", "inside", "in its base", "above"])
def test_an_output_within_or_around_what_is_read_is_refused(base, trained, refused, place):
    outs = {"itself": trained, "inside": trained / "a" / "b", "in its base": base / "packed"}
    out = outs.get(place, trained.parent)
    before = {p: p.stat().st_mtime_ns for p in base.parent.parent.rglob("*")}
    commands = [
        ["pack", f"--model={trained}"],
        ["pack", f"--model={trained}", "--merge-lora", f"--base={base}"],
        ["merge", f"--model={trained}"],
        ["unmerge", f"--model={base}", f"--lora={trained}"],
    ]
    for words in commands:
        line = refused(*words, f"--out={out}")
        assert f"--out: {out} " in line and "model that is read" in line
        assert "choose a place outside" in line and "remove" not in line
    assert {p: p.stat().st_mtime_ns for p in base.parent.parent.rglob("*")} == before


def test_a_link_into_the_model_is_inside_it(trained, refused, tmp_path):
    (tmp_path / "link").symlink_to(trained, target_is_directory=True)
    line = refused("pack", f"--model={trained}", f"--out={tmp_path / 'link' / 'packed'}")
    assert "inside the directory of a model" in line


def test_export_does_not_replace_a_file_of_the_model(base, trained, refused):
    for out in (trained / "model.json", base / "model.json", trained / "new.pth"):
        line = refused("export", f"--model={trained}", f"--out={out}", "--overwrite")
        assert "inside the directory of a model" in line
    assert read_config(trained).lora == LORA and not (trained / "new.pth").exists()


def test_merged_matrices_are_float32_beside_others_of_16_bits(base, command, tmp_path):
    narrow = {
        name: tensor.astype("bfloat16") if tensor.ndim == 2 else tensor
        for name, tensor in Tensors(base).items()
    }
    small = write_model(
        tmp_path / "b", read_config(base), narrow.items(), tokenizer=TOKENIZER_FILES
    )
    out = tmp_path / "packed"
    code, _, err = command(
        "pack", f"--model={train(small, tmp_path / 'm')}", f"--out={out}", "--merge-lora"
    )
    assert code == 0, err
    packed = Tensors(out)
    assert packed.dtype("llm.blocks.0.attn.q.weight") == "F32"
    assert packed.dtype("llm.blocks.0.attn.k.weight") == packed.dtype("llm.embed") == "BF16"


def test_the_fingerprint_is_of_the_configuration_too(base, tmp_path):
    config = read_config(base)
    other = dataclasses.replace(config, llm=dataclasses.replace(config.llm, rope_theta=5e5))
    copy = write_model(tmp_path / "copy", other, Tensors(base).items(), tokenizer=TOKENIZER_FILES)
    assert fingerprint(copy) != fingerprint(base)


def test_tensors_that_do_not_fit_the_configuration_are_not_packed(trained, refused, tmp_path):
    document = read_model_json(trained)
    document["config"]["lora"]["rank"] = 5
    (trained / "model.json").write_text(json.dumps(document))
    line = refused("pack", f"--model={trained}", f"--out={tmp_path / 'packed'}")
    assert f"error: {trained}" in line and "lora" in line and not (tmp_path / "packed").exists()


def test_nan_is_copied_on_request(base, command, tmp_path):
    tensors = dict(Tensors(base).items())
    tensors["projection.bias"] = np.full_like(tensors["projection.bias"], np.nan)
    model = write_model(
        tmp_path / "n", read_config(base), tensors.items(), tokenizer=TOKENIZER_FILES
    )
    out = tmp_path / "packed"
    for options in ([], ["--dtype=bfloat16"]):
        code, _, err = command(
            "pack", f"--model={model}", f"--out={out}", "--allow-nonfinite", *options
        )
        assert code == 0 and np.isnan(Tensors(out)["projection.bias"]).all(), err
        out = tmp_path / "again"
