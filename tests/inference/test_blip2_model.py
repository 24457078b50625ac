"""BLIP-2 with OPT and FlanT5, from `convert build` to captions and answers, against LAVIS."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from flax import nnx
from helpers import blip2_reference as reference
from helpers import virtual_devices
from helpers.blip2_reference import NEEDS_BLIP2

import minigpt4_jax
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import Tensors
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference.blip2_model import Blip2Model
from minigpt4_jax.inference.requests import Completion
from minigpt4_jax.quantization.schemes import dequantize

END = {"opt": 202, "flant5": 1}
QUESTIONS = [
    "what color is the dog?",
    "how many birds are flying over the boat and the house near the old red kitchen chair?",
    "is it really raining?",
    "who's there?",
]


def check(case, details, end):
    """Compare answers, in order, with a case of a dump."""
    outputs = [output for outputs in details for output in outputs]
    assert len(outputs) == len(case["sequences"])
    scores = case.get("sequences_scores") or [None] * len(outputs)
    for output, ids, text, score in zip(
        outputs, case["sequences"], case["text"], scores, strict=True
    ):
        assert output.ids == reference.ended(ids[1:], end), case["options"]
        assert output.text == text
        if score is not None:
            assert output.score == pytest.approx(score, abs=1e-4, rel=1e-4)


@NEEDS_BLIP2
@pytest.mark.parametrize("name", ["opt", "opt-caption", "flant5", "flant5-caption"])
def test_captions_and_answers(name):
    model, images = reference.load(name), reference.pictures()[:4]
    llm, _, kind = name.partition("-")
    _, captions = reference.dump(f"{llm}_generate" + ("_caption" if kind else ""))
    answers = [] if kind else reference.dump(f"{llm}_vqa")[1]

    def caption(case):
        prompt = case["sample_prompt"] or case["model_prompt"]
        return model.caption_details(images, prompt, **case["options"])

    def answer(case):
        return model.answer_details(images, QUESTIONS, **({"prompt": ""} | case["options"]))

    calls = [partial(caption, case) for case in captions]
    calls += [partial(answer, case) for case in answers]
    results = reference.together(model, calls, "answer_all")
    for case, details in zip([*captions, *answers], results, strict=True):
        check(case, details, END[llm])


@NEEDS_BLIP2
def test_captions_encode_images_as_they_are_needed(monkeypatch):
    """Memory does not grow with the number of images: encoding and searching take turns."""
    model, events = reference.load("opt"), []
    encode = model._encoder.encode

    def search(requests, batch_size):
        events.append("search")
        return [[Completion([END["opt"]], [0.0], True, 0.0)]] * len(requests)

    def record(state, pixels):
        events.append(len(pixels))
        return encode(state, pixels)

    monkeypatch.setattr(model._encoder, "encode", record)
    monkeypatch.setattr(model.engine, "search", search)
    assert model.caption([image.copy() for image in reference.pictures() * 4]) == [""] * 24
    encoded = [n for n in events if n != "search"]
    assert sum(encoded) == 24 and max(encoded) <= 8
    assert events.count("search") == 4 and events.index("search") == 2  # batches of 32 // 5 rows


@NEEDS_BLIP2
@pytest.mark.parametrize("name", ["opt", "flant5"])
def test_streams_and_batches(name):
    """Greedy answers one by one, streamed, and as a batch whose slots are refilled, are the same."""
    model, images = reference.load(name), reference.pictures()
    prompts = ["a photo of", "", "Question: what is this? Answer:", "a", "what", "two men"]
    options = {"max_new_tokens": 6}
    together = model.generate(images, prompts, batch_size=2, **options)
    for image, prompt, text in zip(images[:3], prompts, together, strict=False):
        assert "".join(model.stream(image, prompt, **options)) == text
    sampled = model.generate(images[:2], prompts[:2], temperature=1.0, seed=[3, 4], **options)
    assert sampled[1:] == model.generate(
        images[1:2], prompts[1:2], temperature=1.0, seed=4, **options
    )


PROMPTS = ["a photo of", "Question: what is this? Answer:"]


@NEEDS_BLIP2
@pytest.mark.parametrize("name", ["opt", "flant5"])
def test_int8_equals_dequantized_weights(name):
    """Weights and caches in 8 bits, against the same weights as floats."""
    folder = reference.shared(name)
    model = minigpt4_jax.load(folder, "float32", quantize="int8")
    exact, config = load_model(folder, "float32", stacked=False)
    quantized = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(model._state)}
    scales = [path for path in quantized if path[-1].endswith("_scale")]
    assert {path[-1] for path in scales} == {"weight_scale", "embed_scale"}
    for path, leaf in nnx.to_flat_state(nnx.state(exact)):
        value, scale = quantized[path], quantized.get((*path[:-1], f"{path[-1]}_scale"))
        leaf.set_value(value if scale is None else dequantize(value, scale, np.float32))
    floats = Blip2Model(exact, config, model.tokenizer)
    images = reference.pictures()[:2]
    found, expected = (
        m.generate_details(images, PROMPTS, max_new_tokens=6) for m in (model, floats)
    )
    for (a,), (b,) in zip(found, expected, strict=True):
        assert a.ids == b.ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)
    cached = minigpt4_jax.load(folder, "float32", kv_cache="int8")
    first = images[:1], PROMPTS[:1]
    ((a,),) = cached.generate_details(*first, max_new_tokens=6)
    ((b,),) = reference.load(name).generate_details(*first, max_new_tokens=6)
    np.testing.assert_allclose(a.logprobs[:2], b.logprobs[:2], atol=0.1)


@NEEDS_BLIP2
def test_a_mesh_of_two_devices_gives_the_answers_of_one(tmp_path):
    """Every matrix split over the devices: greedy answers and beams."""
    names, images = ("opt", "flant5"), reference.pictures()[:2]
    np.savez(tmp_path / "images.npz", *images)
    script = f"""
import json, sys, numpy as np, minigpt4_jax
images = list(np.load(sys.argv[1]).values())
answers = []
for folder in sys.argv[2:]:
    model = minigpt4_jax.load(folder, "float32", mesh="model:2")
    for beams in (1, 3):
        details = model.generate_details(images, {PROMPTS}, max_new_tokens=6, num_beams=beams)
        answers.append([outputs[0].ids for outputs in details])
print(json.dumps(answers))
"""
    command = [sys.executable, "-c", script, tmp_path / "images.npz", *map(reference.shared, names)]
    done = subprocess.run(
        command, env=virtual_devices.environment(2), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = iter(json.loads(done.stdout.splitlines()[-1]))
    for name in names:
        for beams in (1, 3):
            details = reference.load(name).generate_details(
                images, PROMPTS, max_new_tokens=6, num_beams=beams
            )
            assert next(found) == [outputs[0].ids for outputs in details], (name, beams)


@NEEDS_BLIP2
@pytest.mark.parametrize("name", ["opt", "flant5"])
def test_hugging_face_directories_hold_the_same_model(name):
    ours = Tensors(reference.shared(name))
    theirs = Tensors(reference.shared(f"hf-{name}"))
    assert set(ours) == set(theirs)
    for key in ours:
        a, b = (np.asarray(t[key], np.float32) for t in (ours, theirs))
        if key in ("llm.embed", "llm.head.weight"):  # transformers pads the vocabulary
            b = b[: len(a)]
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=key)


@NEEDS_BLIP2
def test_files_that_do_not_belong_together(tmp_path):
    from convert.build import build
    from convert.build_plan import BuildRequest

    def refused(variant, **paths):
        files = {k: reference.CHECKPOINTS / v for k, v in paths.items()}
        request = BuildRequest(
            variant=variant, out=tmp_path / "x", settings=reference.HEADS, **({"llm": None} | files)
        )
        with pytest.raises(UserError) as error:
            build(request)
        assert not (tmp_path / "x").exists()
        return str(error.value)

    opt, t5 = "blip2_caption_opt.pth", "blip2_caption_flant5.pth"
    assert "a file of BLIP-2 with FlanT5" in refused("blip2-opt", checkpoint=t5, llm="opt")
    assert "needs 't5'" in refused("blip2-flant5", checkpoint=t5, llm="opt")
    assert "needs --llm" in refused("blip2-opt", checkpoint=opt)
    assert "no file has a ViT" in refused(
        "blip2-opt", checkpoint="blip2_pretrained_opt.pth", llm="opt"
    )
    assert "has no language model" in refused("blip2-qformer", checkpoint=opt, llm="opt")
    assert "--tokenizer" in refused("blip2-qformer", checkpoint="blip2_finetune_coco.pth")


@NEEDS_BLIP2
def test_wrong_input():
    model, image = reference.load("opt"), reference.pictures()[0]
    with pytest.raises(UserError, match=r"expected \{\} where the question goes"):
        model.predict_answers(image, "what?", prompt="Question:")
    with pytest.raises(UserError, match="2 images for 1 prompts"):
        model.caption([image, image], ["a photo of"])
    with pytest.raises(UserError, match="max_length 1"):
        model.caption(image, max_length=1)
