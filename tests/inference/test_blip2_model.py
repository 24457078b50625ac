"""BLIP-2 with OPT and FlanT5, from `convert build` to captions and answers, against LAVIS."""

from functools import partial

import numpy as np
import pytest
from helpers import blip2_reference as reference
from helpers.blip2_reference import NEEDS_BLIP2

from minigpt4_jax.checkpoint.model_directory import Tensors
from minigpt4_jax.errors import UserError

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
    results = reference.together(model, calls)
    for case, details in zip([*captions, *answers], results, strict=True):
        check(case, details, END[llm])


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
