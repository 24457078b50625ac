"""convert export --format=huggingface: transformers loads the same model, and `convert build` too."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import blip2_reference as reference
from helpers.blip2_reference import NEEDS_BLIP2
from safetensors.numpy import load_file, save_file

from convert.build import build
from convert.build_plan import BuildRequest
from convert.hf_export import export_huggingface
from convert.hf_export_tokenizer import choose_image_token
from minigpt4_jax.checkpoint.model_directory import Tensors, read_config
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.errors import UserError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = NEEDS_BLIP2
HF = reference.CHECKPOINTS / "hf"
ORIGINALS = {"hf-opt": HF / "opt", "hf-flant5": HF / "flan-t5", "hf-itm": HF / "itm_coco"}
PROMPTS = ["a photo of a dog.", "what is it?"]
STAGE1_HEADS = ("qformer.temperature", "qformer.lm_head.")


def load(folder):
    """The model of a directory in transformers, of which no weight is missing or unknown."""
    (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def inputs_of(folder, prompts=PROMPTS[:1]):
    """What Blip2Processor makes of a picture and texts."""
    processor = transformers.Blip2Processor.from_pretrained(folder)
    images = reference.pictures()[:1] * len(prompts)
    return processor(images=images, text=prompts, padding=True, return_tensors="pt")


def logits(model, inputs):
    if model.config.architectures == ["Blip2ForImageTextRetrieval"]:
        outputs = [model(**inputs, use_image_text_matching_head=h) for h in (False, True)]
        return torch.cat([output.logits_per_image.flatten() for output in outputs])
    if model.config.is_encoder_decoder:
        inputs = {**inputs, "decoder_input_ids": torch.tensor([[0, 7, 9]])}
    return model(**inputs).logits


def assert_same_model(ours, again, left_out=()):
    """The tensors of two model directories are equal, bit for bit, and so are their configurations."""
    one, two = Tensors(ours), Tensors(again)
    assert {n for n in one if not n.startswith(left_out)} == set(two)
    for name in two:
        assert one.dtype(name) == two.dtype(name), name
        assert one[name].tobytes() == two[name].tobytes(), name
    a, b = read_config(ours).to_dict(), read_config(again).to_dict()
    if left_out:
        a["qformer"]["lm_head"] = False
    assert a == b


def build_again(folder, out, variant):
    build(BuildRequest(variant, None, out, checkpoint=folder))
    return out


@pytest.mark.parametrize("name", ORIGINALS)
def test_models_of_transformers_come_back(tmp_path, name):
    """Weights, logits, what the processor makes, and answers are those of the directory converted."""
    out = tmp_path / "out"
    export_huggingface(reference.shared(name), out)
    theirs, ours = load(ORIGINALS[name]), load(out)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    inputs = inputs_of(out)
    if name == "hf-itm":  # the original's processor adds tokens that its model has no rows for
        tokenizer = transformers.AutoTokenizer.from_pretrained(ORIGINALS[name])
        assert inputs["input_ids"].tolist() == tokenizer(PROMPTS[:1])["input_ids"]
    else:
        original = inputs_of(ORIGINALS[name])
        assert all(torch.equal(inputs[key], original[key]) for key in original)
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), atol=1e-4, rtol=0)
        if name != "hf-itm":
            answers = [m.generate(**inputs, max_new_tokens=6).tolist() for m in (ours, theirs)]
            assert answers[0] == answers[1]
    again = build_again(out, tmp_path / "again", read_config(reference.shared(name)).variant)
    assert_same_model(reference.shared(name), again)


@pytest.mark.parametrize(
    ("name", "original"), [("opt", "hf-opt"), ("flant5", "hf-flant5"), ("coco", "hf-itm")]
)
def test_models_of_lavis(tmp_path, capsys, name, original):
    """Types are mixed, and some parts of stage 1 have no place. The logits are those of the same weights
    in a directory that was not made here."""
    model, out = reference.shared(name), tmp_path / "out"
    export_huggingface(model, out)
    notes = capsys.readouterr().out
    assert ("float32, so config.json says float32" in notes) == (name != "coco")
    left_out = STAGE1_HEADS if name == "coco" else ()
    for what in ("head that writes captions", "temperature of the contrastive loss"):
        assert (what in notes) == bool(left_out)
    ours, theirs, inputs = load(out), load(ORIGINALS[original]), inputs_of(out)
    with torch.no_grad():
        found, expected = logits(ours, inputs), logits(theirs, inputs)
    expected = expected[..., : found.shape[-1]]  # of OPT they have padding
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    build_again(out, tmp_path / "again", read_config(model).variant)
    assert_same_model(model, tmp_path / "again", left_out)


def test_what_was_trained_is_exported(tmp_path):
    """A directory that training wrote has the trained parts only; the rest comes from its base, which was
    moved here."""
    base = Path(shutil.copytree(reference.shared("hf-opt"), tmp_path / "base"))
    config = read_config(base)
    t = Tensors(base)
    names = ("projection.bias", "qformer.query", "qformer.blocks.0.attn.q.bias", "ln_vision.bias")
    changed = {name: t[name] + np.float32(1) for name in names}
    changed["vit.blocks.0.attn.q_bias"] = t["vit.blocks.0.attn.q_bias"] - np.float32(1)
    write_model(tmp_path / "trained", config, changed.items(), base=base)
    moved = base.rename(tmp_path / "moved")
    keys = export_huggingface(tmp_path / "trained", tmp_path / "out", base=moved)
    state, before = load(tmp_path / "out").state_dict(), load(HF / "opt").state_dict()
    different = {key for key in keys if not torch.equal(state[key], before[key])}
    bias = "vision_model.encoder.layers.0.self_attn.qkv.bias"
    assert different == {
        "language_projection.bias", "query_tokens", "vision_model.post_layernorm.bias", bias,
        "qformer.encoder.layer.0.attention.attention.query.bias",
    }  # fmt: skip
    torch.testing.assert_close(state[bias][:32], before[bias][:32] - 1)
    assert torch.equal(state[bias][32:], before[bias][32:])


@pytest.mark.parametrize("tied", [True, False])
def test_output_matrices(tmp_path, capsys, tied):
    """FlanT5 without lm_head, as transformers 5 saves it, and OPT with one of its own."""
    source, variant = (HF / "flan-t5", "blip2-flant5") if tied else (HF / "opt", "blip2-opt")
    folder = tmp_path / "hf"
    shutil.copytree(source, folder)
    folder.chmod(0o755)
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    if tied:
        del tensors["language_model.lm_head.weight"]
        config["text_config"] |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    else:
        rows = tensors["language_model.model.decoder.embed_tokens.weight"]
        tensors["language_model.lm_head.weight"] = np.ascontiguousarray(rows[::-1])
        config["text_config"]["tie_word_embeddings"] = False
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    build_again(folder, tmp_path / "ours", variant)
    export_huggingface(tmp_path / "ours", tmp_path / "out")
    assert ("transformers 4 reads that as T5 1.0" in capsys.readouterr().out) == tied
    written = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert written["tie_word_embeddings"] == tied  # which transformers 4 goes by
    theirs, ours = load(folder), load(tmp_path / "out")
    embedding = ours.get_input_embeddings().weight
    assert torch.equal(ours.get_output_embeddings().weight, embedding) == tied
    inputs = inputs_of(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(logits(ours, inputs), logits(theirs, inputs), atol=1e-4, rtol=0)
    assert_same_model(tmp_path / "ours", build_again(tmp_path / "out", tmp_path / "x", variant))


def test_shards(tmp_path):
    """Above the limit there are several files and their index."""
    model, out = reference.shared("hf-itm"), tmp_path / "out"
    export_huggingface(model, out, shard_bytes=300_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in files]
    assert sum(sizes) == index["metadata"]["total_size"]
    # the word embedding is larger than the limit
    assert sorted(sizes)[-1] == 4 * 3001 * 32 and sorted(sizes)[-2] <= 300_000
    assert set(index["weight_map"]) == {key for file in files for key in load_file(file)}
    assert torch.equal(
        load(out).embeddings.word_embeddings.weight,
        load(HF / "itm_coco").embeddings.word_embeddings.weight,
    )
    assert_same_model(model, build_again(out, tmp_path / "again", "blip2-qformer"))


def test_the_image_token_is_that_of_the_converted_directory(tmp_path, capsys):
    """Whoever feeds ids to a model of transformers can feed the same to what is exported."""
    folder = tmp_path / "hf"
    shutil.copytree(HF / "opt", folder, copy_function=lambda a, b: shutil.copyfile(a, b))
    folder.chmod(0o755)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": 447}))
    build_again(folder, tmp_path / "ours", "blip2-opt")
    export_huggingface(tmp_path / "ours", tmp_path / "out")
    assert load(tmp_path / "out").config.image_token_index == 447
    assert "image_token_index is 447" in capsys.readouterr().out
    files = reference.shared("opt") / "tokenizer"
    assert choose_image_token(files, 432, None, []) == 420
    with pytest.raises(UserError, match=r"<image> would be token 420, and .* has 420 rows"):
        choose_image_token(files, 420, None, [])


def changed_model(folder, name="hf-opt", **values):
    """A copy of a model directory with other values in its configuration; "llm.eps" is eps of llm."""
    shutil.copytree(reference.shared(name), folder)
    document = json.loads((folder / "model.json").read_text())
    for key, value in values.items():
        part, _, field = key.rpartition("__")
        (document["config"][part] if part else document["config"])[field] = value
    (folder / "model.json").write_text(json.dumps(document))
    return folder


def test_what_is_not_recorded_is_said(tmp_path, command):
    model = changed_model(tmp_path / "model", caption_prompt="a photo of", end_symbol="###")
    code, text, err = command(
        "export", "--format=huggingface", f"--model={model}", f"--out={tmp_path / 'out'}"
    )
    assert code == 0 and "wrote" in text, err
    assert "note: caption_prompt is 'a photo of', which the directory does not record" in text
    assert "note: end_symbol '###' is 3 tokens" in text
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 2, "pad_token_id": 1, "bos_token_id": 2}


def test_every_end_of_an_answer_is_written_and_read_again(tmp_path):
    """transformers' generate takes them from text_config, not from generation_config.json."""
    model, out = changed_model(tmp_path / "model", tokenizer__end_ids=[7]), tmp_path / "out"
    export_huggingface(model, out)
    (newline,) = {load(ORIGINALS["hf-opt"]).language_model.generation_config.eos_token_id}
    assert load(out).language_model.generation_config.eos_token_id == [newline, 7]
    again = read_config(build_again(out, tmp_path / "again", "blip2-opt"))
    assert again.tokenizer.end_ids == (7,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantize": "int8"}, "is quantized to int8"),
        ({"lora": {"rank": 2}}, "python -m convert merge"),
        ({"variant": "instructblip-vicuna"}, "expected blip2-opt, blip2-flant5, blip2-qformer"),
        ({"llm__eps": 1e-3}, "llm.eps is 0.001, and transformers' classes have 1e-05"),
    ],
)
def test_models_that_have_no_such_directory(tmp_path, refused, values, message):
    model = changed_model(tmp_path / "model", **values)
    out = tmp_path / "out"
    assert message in refused("export", "--format=huggingface", f"--model={model}", f"--out={out}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_refusals_leave_nothing(tmp_path, refused, monkeypatch):
    model, out = changed_model(tmp_path / "model"), tmp_path / "out"
    arguments = ["export", "--format=huggingface", f"--model={model}", f"--out={out}"]
    assert "choose another --out" in refused(*arguments, "--overwrite")
    assert "is inside the directory of a model" in refused(*arguments[:3], f"--out={model / 'x'}")
    out.mkdir()
    (out / "precious").touch()
    assert "exists and is not empty" in refused(*arguments)
    shutil.rmtree(out)
    assert "--format=huggingface writes a directory" in refused(
        "export", f"--model={model}", f"--out={tmp_path}"
    )

    path = next(model.glob("llm-*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert f"{path} is damaged" in refused(*arguments)
    path.unlink()
    assert "do not match the model: llm." in refused(*arguments)
    path.write_bytes(whole)
    tensors = load_file(path)
    tensors["llm.embed"][0, 0] = np.nan
    save_file(tensors, path)
    assert "llm.embed: 1 of" in refused(*arguments)
    path.write_bytes(whole)
    (model / "tokenizer" / "vocab.json").write_text("{x")
    assert f"cannot read the tokenizer in {model / 'tokenizer'}" in refused(*arguments)
    shutil.rmtree(model / "tokenizer")
    assert "has no tokenizer/" in refused(*arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_full_disk_leaves_nothing(tmp_path, refused, monkeypatch):
    from convert import hf_export

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_export, "write_safetensors", full)
    model, out = reference.shared("hf-opt"), tmp_path / "out"
    line = refused("export", "--format=huggingface", f"--model={model}", f"--out={out}")
    assert "the disk is full; nothing was written" in line
    assert not list(tmp_path.iterdir())
