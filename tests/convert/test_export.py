"""convert export: the original's .pth, bit for bit."""

import errno

import numpy as np
import pytest
from helpers.paths import REFERENCE
from helpers.released_files import CHECKPOINTS, lora_state, projection_state, save_pth
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from convert.export import write_torch
from convert.formats.readers import open_file
from minigpt4_jax.checkpoint.model_directory import Tensors, read_config
from minigpt4_jax.checkpoint.writer import write_model


@pytest.mark.smoke
@pytest.mark.parametrize("variant, letter", CHECKPOINTS.items())
def test_round_trip_is_bit_exact(files, command, variant, letter):
    code, _, err = command(*files.arguments(variant))
    assert code == 0, err
    out = files.folder / "trained.pth"
    code, text, err = command(
        "export", f"--model={files.folder / f'model_{letter}'}", f"--out={out}"
    )
    assert code == 0 and "wrote" in text, err
    want = open_file(files.folder / f"{letter}.pth")
    got = open_file(out)
    keys = [k for k in want.tensors if "inv_freq" not in k]
    assert set(got.tensors) == set(keys)
    for key in keys:
        assert got.read(key).tobytes() == want.read(key).tobytes()
    code, _, err = command(*files.arguments(variant, checkpoint=out, out=files.folder / "again"))
    assert code == 0, err
    one, two = Tensors(files.folder / f"model_{letter}"), Tensors(files.folder / "again")
    assert all(one[n].tobytes() == two[n].tobytes() for n in one)


def test_equal_weights_give_equal_files(tmp_path):
    state = projection_state(12)
    assert (
        save_pth(tmp_path / "x.pth", state).read_bytes()
        == save_pth(tmp_path / "x.pth", state).read_bytes()
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(state=st.dictionaries(st.text(min_size=1), st.tuples(
    st.lists(st.integers(0, 4), max_size=3), st.sampled_from(["float32", "float16", "bfloat16"])),
    min_size=1, max_size=4))  # fmt: skip
def test_torch_reads_what_is_written(tmp_path, state):
    torch = pytest.importorskip("torch")
    import ml_dtypes

    types = {"bfloat16": ml_dtypes.bfloat16}
    rng = np.random.default_rng(0)
    arrays = {k: rng.normal(size=s).astype(types.get(t, t)) for k, (s, t) in state.items()}
    path = tmp_path / "x.pth"
    write_torch(path, {k: (lambda a=a: a) for k, a in arrays.items()})
    for arguments in ({"weights_only": True}, {"weights_only": False}, {"mmap": True}):
        read = torch.load(path, map_location="cpu", **arguments)["model"]
        assert list(read) == list(arrays)
        for key, want in arrays.items():
            got = read[key]
            assert got.dtype == getattr(torch, want.dtype.name) and tuple(got.shape) == want.shape
            if want.size:
                data = got.reshape(-1).view(torch.uint8).numpy().tobytes()
                assert data == want.tobytes()


def test_what_training_changed_is_exported(files, command):
    assert command(*files.arguments("minigpt4-vicuna"))[0] == 0
    base, trained = files.folder / "model_a", files.folder / "run"
    t = Tensors(base)
    changed = {
        n: t[n] + np.float32(1) for n in ("projection.weight", "projection.bias", "qformer.query")
    }
    changed["vit.patch.weight"] = t["vit.patch.weight"].astype(np.float32) + 1
    write_model(trained, read_config(base), changed.items(), base=base)
    code, _, err = command("export", f"--model={trained}", f"--out={files.folder / 'x.pth'}")
    assert code == 0, err
    got = open_file(files.folder / "x.pth")
    assert set(got.tensors) == {
        "llama_proj.weight", "llama_proj.bias", "query_tokens",
        "visual_encoder.patch_embed.proj.weight",
    }  # fmt: skip
    assert np.array_equal(got.read("llama_proj.bias"), changed["projection.bias"])
    assert got.tensors["query_tokens"].shape == (1, 3, 12)
    assert got.tensors["visual_encoder.patch_embed.proj.weight"].shape == (16, 3, 2, 2)
    code, _, err = command(
        *files.arguments(
            "minigpt4-vicuna", checkpoint=files.folder / "x.pth", out=files.folder / "y"
        )
    )
    assert code == 0, err
    again = Tensors(files.folder / "y")
    assert all(np.array_equal(again[n], changed.get(n, t[n])) for n in t)


def test_refusals_leave_nothing(files, refused, command, monkeypatch):
    assert command(*files.arguments("minigpt4-vicuna"))[0] == 0
    model = files.folder / "model_a"
    assert "model.json" in refused("export", f"--model={files.folder}", "--out=/tmp/x.pth")
    assert "is a directory" in refused("export", f"--model={model}", f"--out={files.folder}")
    line = refused("export", f"--model={model}", "--out=/no/such/folder/x.pth")
    assert "cannot write" in line
    from convert import export

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = set(files.folder.iterdir())
    monkeypatch.setattr(export, "_write_zip", full)
    assert "disk is full" in refused(
        "export", f"--model={model}", f"--out={files.folder / 'x.pth'}"
    )
    assert set(files.folder.iterdir()) == before


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs ../shared/reference")
@pytest.mark.parametrize("name", ["a_minigpt4_vicuna", "b_minigpt4_llama2", "c_minigptv2"])
def test_reference_checkpoints_through_the_writer(name, tmp_path):
    torch = pytest.importorskip("torch")
    path = REFERENCE / "checkpoints" / f"{name}.pth"
    reader = open_file(path)
    keys = [k for k in reader.tensors if "position_ids" not in k]
    write_torch(tmp_path / "x.pth", {k: (lambda k=k: reader.read(k)) for k in keys})
    want = torch.load(path, weights_only=True)["model"]
    got = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert all(torch.equal(got[k], want[k]) for k in keys)


def test_lora_keys_are_the_originals(files, command):
    assert command(*files.arguments("minigpt-v2"))[0] == 0
    out = files.folder / "x.pth"
    assert command("export", f"--model={files.folder / 'model_c'}", f"--out={out}")[0] == 0
    assert set(open_file(out).tensors) == set(lora_state(files.llm_config)) | set(
        projection_state(64)
    )


def test_an_existing_file_is_replaced_only_on_request(files, command, refused):
    assert command(*files.arguments("minigpt4-vicuna"))[0] == 0
    out = files.folder / "mine.pth"
    out.write_bytes(b"precious")
    arguments = ["export", f"--model={files.folder / 'model_a'}", f"--out={out}"]
    line = refused(*arguments)
    assert "mine.pth exists" in line and "--overwrite" in line
    assert out.read_bytes() == b"precious"
    assert command(*arguments, "--overwrite")[0] == 0
    assert "llama_proj.weight" in open_file(out).tensors


def test_weights_that_are_not_finite_are_exported_only_on_request(files, command, refused):
    assert command(*files.arguments("minigpt4-vicuna"))[0] == 0
    name, out = "projection.weight", files.folder / "nan.pth"
    path = next(p for p in (files.folder / "model_a").glob("*") if name in _tensors_of(p))
    tensors = load_file(path)
    tensors[name][0, 0] = np.nan
    save_file(tensors, path)
    arguments = ["export", f"--model={files.folder / 'model_a'}", f"--out={out}"]
    assert "projection.weight: 1 of 192 values are NaN" in refused(*arguments) and not out.exists()
    assert command(*arguments, "--allow-nonfinite")[0] == 0 and out.exists()


def _tensors_of(path):
    return load_file(path) if path.suffix == ".safetensors" else ()
