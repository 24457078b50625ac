"""Files that are damaged, wrong or do not fit together: one error line each, nothing written."""

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
from helpers.released_files import (
    llm_config,
    llm_state,
    lora_state,
    projection_state,
    save_hf,
    save_pth,
    save_sharded,
    vit_state,
)
from safetensors.numpy import save_file

from convert.formats.readers import open_file


@pytest.fixture
def nothing_written(files):
    yield
    assert not list(files.folder.glob("model_*")) and not list(files.folder.glob(".*"))


pytestmark = pytest.mark.usefixtures("nothing_written")

HTML = b"<!DOCTYPE html><html><body>Sign in to download</body></html>"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1893\n"
WRONG_CONTENT = {
    "web page (HTML)": HTML,
    "Git LFS pointer": LFS,
    "empty": b"",
    "begins with zeros": bytes(4096),
    "not a checkpoint": b"hello, world",
}


@pytest.mark.smoke
@pytest.mark.parametrize("message", WRONG_CONTENT)
@pytest.mark.parametrize("option", ["vision", "qformer", "checkpoint", "llm"])
def test_files_that_are_not_weights(files, refused, option, message):
    path = files.folder / "bad.pth"
    path.write_bytes(WRONG_CONTENT[message])
    if option == "llm":
        os.replace(path, files.folder / "llm" / "model.safetensors")
        line = refused(*files.arguments("minigpt4-vicuna"))
        assert "model.safetensors" in line and message in line
    else:
        line = refused(*files.arguments("minigpt4-vicuna", **{option: path}))
        assert "bad.pth" in line and message in line


@pytest.mark.parametrize(
    "option", ["vision", "qformer", "checkpoint", "llm", "tokenizer", "llm-delta"]
)
def test_missing_files(files, refused, option):
    line = refused(*files.arguments("minigpt4-vicuna"), f"--{option}=/no/such/file")
    assert "/no/such/file" in line


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("name", ["eva.pth", "blip2.pth", "a.pth", "llm/model.safetensors"])
def test_truncated_files(files, refused, name, share):
    path = files.folder / name
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    line = refused(*files.arguments("minigpt4-vicuna"))
    assert path.name in line and ("truncated" in line or "damaged" in line)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/minigpt4_jax_pwned",)


def _zip_of(pickled: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("archive/data.pkl", pickled)
    return out.getvalue()


@pytest.mark.smoke
@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("pack", [_zip_of, bytes], ids=["zip", "plain"])
def test_a_pickle_with_code_is_named_and_not_run(files, refused, pack, protocol, tmp_path):
    if pack is bytes and protocol == 0:
        pytest.skip("text pickles have no signature; they are refused as unknown")
    marker = "/tmp/minigpt4_jax_pwned"
    path = files.folder / "evil.pth"
    path.write_bytes(pack(pickle.dumps({"model": Evil()}, protocol)))
    line = refused(*files.arguments("minigpt4-vicuna", checkpoint=path))
    assert "posix.system" in line and "nothing was run" in line
    assert not os.path.exists(marker)


# --- files that do not belong together ------------------------------------------------------------


def test_files_in_the_wrong_option_are_recognised(files, refused):
    at = files.folder
    line = refused(*files.arguments("minigpt4-vicuna", vision=at / "blip2.pth"))
    assert "BLIP-2" in line and "--qformer" in line
    line = refused(*files.arguments("minigpt4-vicuna", qformer=at / "eva.pth"))
    assert "EVA-ViT" in line and "--vision" in line
    line = refused(*files.arguments("minigpt4-vicuna", checkpoint=at / "llm" / "model.safetensors"))
    assert "language model" in line and "--llm" in line
    line = refused(*files.arguments("minigpt4-vicuna", llm=at / "eva.pth"))
    assert "eva.pth" in line and "directory" in line


def test_missing_parts_of_a_vision_encoder(files, refused):
    state = vit_state()
    del state["cls_token"], state["pos_embed"]
    path = save_pth(files.folder / "part.pth", state)
    line = refused(*files.arguments("minigpt4-vicuna", vision=path))
    assert "no class token (cls_token), position embedding (pos_embed); expected" in line


def test_wrong_variant(files, refused):
    line = refused(*files.arguments("minigpt4-vicuna", checkpoint=files.folder / "b.pth"))
    assert "projects from width 64" in line and "minigpt4-llama2" in line
    line = refused(*files.arguments("minigpt4-llama2", checkpoint=files.folder / "a.pth"))
    assert "projects from width 12" in line and "minigpt4-vicuna" in line
    line = refused(*files.arguments("minigpt4-llama2", checkpoint=files.folder / "c.pth"))
    assert "LoRA" in line and "--variant=minigpt-v2" in line
    line = refused(*files.arguments("minigpt-v2", checkpoint=files.folder / "b.pth"))
    assert "no LoRA" in line
    line = refused(*files.arguments("minigpt4-vicuna"), "--variant=minigpt5")
    assert "minigpt5" in line and "minigpt4-llama2" in line


def test_projection_for_another_language_model(files, refused):
    path = save_pth(files.folder / "13b.pth", projection_state(12, 20))
    line = refused(*files.arguments("minigpt4-vicuna", checkpoint=path))
    assert "width 20" in line and "width 16" in line


def test_vocabulary_against_tokenizer(files, refused, tmp_path):
    for vocab, words in ((700, "tokenizer has 785"), (9000, "tokenizer only 785")):
        config = llm_config(vocab_size=vocab)
        save_hf(tmp_path / str(vocab), config, llm_state(config))
        line = refused(*files.arguments("minigpt4-vicuna", llm=tmp_path / str(vocab)))
        assert words in line and str(vocab) in line
    state = llm_state(llm_config(vocab_size=800))
    save_hf(tmp_path / "mixed", llm_config(), state)
    assert "embedding has 800" in refused(
        *files.arguments("minigpt4-vicuna", llm=tmp_path / "mixed")
    )


def test_missing_or_broken_tokenizer(files, refused, tmp_path):
    save_hf(tmp_path / "bare", files.llm_config, files.llm, tokenizer=False)
    line = refused(*files.arguments("minigpt4-vicuna", llm=tmp_path / "bare"))
    assert "no tokenizer" in line and "--tokenizer" in line
    (files.folder / "llm" / "tokenizer.model").write_bytes(HTML)
    line = refused(*files.arguments("minigpt4-vicuna"))
    assert str(files.folder / "llm") in line and "sentencepiece" in line


def test_language_model_directories(files, refused, tmp_path):
    llm = files.folder / "llm"
    config = json.dumps(files.llm_config)
    (llm / "config.json").write_text("<html>")
    assert "not JSON" in refused(*files.arguments("minigpt4-vicuna"))
    (llm / "config.json").write_text(json.dumps(files.llm_config | {"model_type": "gpt_neox"}))
    line = refused(*files.arguments("minigpt4-vicuna"))
    assert "gpt_neox" in line and "qwen3" in line
    (llm / "config.json").write_text(json.dumps(files.llm_config | {"hidden_size": 32}))
    line = refused(*files.arguments("minigpt4-vicuna", checkpoint=None))
    assert "expected (785, 32)" in line
    (llm / "config.json").unlink()
    assert "no config.json" in refused(*files.arguments("minigpt4-vicuna"))
    (llm / "config.json").write_text(config)
    (llm / "model.safetensors").unlink()
    assert "no weights" in refused(*files.arguments("minigpt4-vicuna"))


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_incomplete_shards(files, refused, suffix):
    llm = files.folder / "llm"
    save_sharded(llm, files.llm, suffix)
    first = min(llm.glob(f"*-00001-of-00002.{suffix}"))
    index = next(llm.glob("*.index.json"))
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.layers.7.mlp.up_proj.weight"] = first.name
    original = index.read_text()
    index.write_text(json.dumps(listed))
    assert "model.layers.7" in refused(*files.arguments("minigpt4-vicuna"))
    index.write_text(original.replace(first.name, "../../secret.bin"))
    assert "outside" in refused(*files.arguments("minigpt4-vicuna"))
    index.write_text(original)
    first.unlink()
    assert first.name in refused(*files.arguments("minigpt4-vicuna"))


def test_every_key_is_used_ignored_or_named(files, refused):
    odd = files.vit | {"blocks.0.attn.rel_pos": np.ones(3, np.float32)}
    path = save_pth(files.folder / "odd.pth", odd)
    line = refused(*files.arguments("minigpt4-vicuna", vision=path))
    assert "unknown key blocks.0.attn.rel_pos" in line
    less = {k: v for k, v in files.vit.items() if k != "blocks.1.norm2.bias"}
    path = save_pth(files.folder / "less.pth", less)
    line = refused(*files.arguments("minigpt4-vicuna", vision=path))
    assert "less.pth has no blocks.1.norm2.bias" in line and "vit." not in line
    lora = lora_state(files.llm_config)
    missing = next(iter(lora))
    lora.pop(missing)
    path = save_pth(files.folder / "c.pth", projection_state(64) | lora)
    line = refused(*files.arguments("minigpt-v2"))
    assert f"c.pth has no {missing}" in line
    both = lora_state(files.llm_config) | lora_state(files.llm_config, middle="default.")
    save_pth(files.folder / "c.pth", projection_state(64) | both)
    assert "the same parameter" in refused(*files.arguments("minigpt-v2"))


def test_all_problems_are_in_one_message(files, refused):
    odd = {k: v for k, v in files.vit.items() if "norm2" not in k} | {"x.y": np.ones(2, np.float32)}
    path = save_pth(files.folder / "odd.pth", odd)
    line = refused(*files.arguments("minigpt4-vicuna", vision=path))
    assert "x.y" in line and "no blocks.0.norm2.weight" in line and "no blocks.1.norm2.bias" in line


def test_numbers_of_heads_must_be_given(files, refused):
    heads = ("--set", "vision.heads=2", "--set=qformer.heads=3")
    arguments = [a for a in files.arguments("minigpt4-vicuna") if a not in heads]
    line = refused(*arguments)
    assert "--set vision.heads=N" in line
    assert "--set qformer.heads=N" in refused(*arguments, "--set=vision.heads=2")
    line = refused(*arguments, "--set=vision.heads=3", "--set=qformer.heads=3")
    assert "not divisible" in line


def test_settings(files, refused):
    arguments = files.arguments("minigpt4-vicuna")
    line = refused(*arguments, "--set=vision.dept=2")
    assert "vision.dept" in line and "did you mean vision.depth" in line
    assert "qformer.layers or llm.layers" in refused(*arguments, "--set=layers=2")
    assert "whole number" in refused(*arguments, "--set=vision.depth=two")
    assert "whole number" in refused(*arguments, "--set=vision.heads=0")
    assert "KEY=VALUE" in refused(*arguments, "--set=vision.depth")
    assert "eva.pth has no blocks.3." in refused(*arguments, "--set=vision.depth=4")
    assert "multiple of the patch" in refused(*arguments, "--set=image_size=7")
    assert "has no {}" in refused(*arguments, "--set=prompt_template=hello")
    assert "--llm" in refused("build", "--out=/tmp/x")
    assert "invalid choice" in refused("bild")


def test_vision_without_its_q_former(files, refused):
    line = refused(*files.arguments("minigpt4-vicuna", qformer=None))
    assert "--qformer=FILE" in line
    path = save_pth(files.folder / "wide.pth", vit_state(width=20))
    line = refused(*files.arguments("minigpt4-vicuna", vision=path))
    assert "width 16" in line and "20" in line


def test_a_delta_of_another_model(files, refused, tmp_path):
    config = llm_config(num_hidden_layers=1)
    save_hf(tmp_path / "delta", config, llm_state(config))
    line = refused(*files.arguments("minigpt4-vicuna", llm_delta=tmp_path / "delta"))
    assert "--llm-delta" in line and "the base only" in line


def test_missing_tensors_are_named_as_in_their_files(files, refused):
    reader = open_file(files.folder / "blip2.pth")
    missing = "Qformer.bert.encoder.layer.1.attention.self.key.bias"
    blip = {key: reader.read(key) for key in reader.tensors if key != missing}
    path = save_pth(files.folder / "q.pth", blip)
    line = refused(*files.arguments("minigpt4-vicuna", qformer=path))
    assert f"q.pth has no {missing}" in line


def test_missing_tensors_are_named_in_the_spelling_of_their_file(files, refused):
    lora = lora_state(files.llm_config, middle="default.")  # peft 0.3 and later
    missing = next(iter(lora))
    lora.pop(missing)
    save_pth(files.folder / "c.pth", projection_state(64) | lora)
    assert f"c.pth has no {missing}" in refused(*files.arguments("minigpt-v2"))
    for name in ("norm.weight", "layers.1.mlp.up_proj.weight"):
        for prefix in ("model.", ""):
            llm = {prefix + key.removeprefix("model."): v for key, v in files.llm.items()}
            llm["lm_head.weight"] = llm.pop(f"{prefix}lm_head.weight")
            del llm[prefix + name]
            save_file(llm, files.folder / "llm" / "model.safetensors")
            line = refused(*files.arguments("minigpt4-vicuna"))
            assert f" has no {prefix}{name}" in line
