"""BLIP-2's first stage, from `convert build` to features, scores and captions, against LAVIS."""

from functools import partial

import numpy as np
import pytest
from helpers import blip2_reference as reference
from helpers.blip2_reference import NEEDS_BLIP2

from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.errors import UserError
from minigpt4_jax.inference import qformer_model
from minigpt4_jax.inference.qformer_model import caption_config
from minigpt4_jax.inference.retrieval import recall, rerank

SEP = 102


@pytest.fixture(scope="module", params=["pretrain", "coco", "hf-itm"])
def case(request):
    """(name, model) of a Q-Former; two are the same weights from different files."""
    return request.param, reference.load(request.param)


@pytest.fixture
def pretrained():
    return reference.load("pretrain")


@NEEDS_BLIP2
def test_features_and_scores(case):
    name, model = case
    size = "pretrain" if name == "pretrain" else "coco"
    images = reference.pictures()[:3]
    features = model.encode_image(images)
    if name != "hf-itm":
        expected, texts = reference.dump("features" + ("" if size == "pretrain" else "_coco"))
        np.testing.assert_allclose(features.embeds, expected["image_embeds"], atol=2e-5)
        np.testing.assert_allclose(features.projected, expected["image_embeds_proj"], atol=2e-5)
        text = model.encode_text(texts["text_input"])
        assert text.lengths.tolist() == expected["attention_mask"].sum(1).tolist()
        np.testing.assert_allclose(text.embeds, expected["text_embeds"], atol=2e-5)
        np.testing.assert_allclose(text.projected, expected["text_embeds_proj"], atol=2e-5)
        both = model.encode_multimodal(features, texts["text_input"])
        np.testing.assert_allclose(both, expected["multimodal_embeds"], atol=2e-5)
    expected, texts = reference.dump(f"itm_{size}")
    np.testing.assert_allclose(
        model.itc_scores(features, texts["text_input"]), expected["itc"], atol=2e-5
    )
    logits = model.itm_logits(images[1], texts["text_input"])
    np.testing.assert_allclose(logits, expected["itm_logits"][1], atol=1e-4)


@NEEDS_BLIP2
@pytest.mark.parametrize("k", [1, 4])
def test_retrieval(case, k):
    name, model = case
    expected, texts = reference.dump("retrieval_" + ("pretrain" if name == "pretrain" else "coco"))
    scores = model.retrieve(reference.pictures(), texts["texts"], k_test=k)
    np.testing.assert_allclose(scores.image_to_text, expected[f"i2t_k{k}"], atol=1e-4)
    np.testing.assert_allclose(scores.text_to_image, expected[f"t2i_k{k}"], atol=1e-4)
    truth = [texts["img2txt"][str(i)] for i in range(6)]
    metrics = recall(scores, truth, texts["txt2img"])
    original = texts["metrics"][f"k{k}"]
    for ours, theirs in (("text", "txt"), ("image", "img")):
        for rank in ("r1", "r5", "r10"):
            assert metrics[f"{ours}_{rank}"] == pytest.approx(original[f"{theirs}_{rank}"])
    assert metrics["mean"] == pytest.approx(original["r_mean"])


@NEEDS_BLIP2
def test_captions(pretrained):
    images = reference.pictures()[:4]
    _, cases = reference.dump("stage1_captions")

    def answers(case):
        options = {k: v for k, v in case["options"].items() if k != "repetition_penalty"}
        requests = pretrained.prepare_requests(images, [""] * 4, caption_config(**options))
        return pretrained.answer_requests(requests)

    results = reference.together(pretrained, [partial(answers, case) for case in cases])
    for case, details in zip(cases, results, strict=True):
        for i, (output,) in enumerate(details):
            assert output.ids == reference.ended(case["sequences"][i][1:], SEP), case["options"]
            assert output.text == case["text"][i]
            if "sequences_scores" in case:
                assert output.score == pytest.approx(case["sequences_scores"][i], abs=1e-4)
    assert cases[0]["options"] == {}
    # As many rows as have three beams above, which so need no program of their own.
    again, text = [*images, *images], cases[0]["text"] * 2
    assert pretrained.caption(again) == text
    assert pretrained.generate(again, [""] * 8, caption_config()) == text
    streamed = "".join(pretrained.stream(images[0], "", caption_config(num_beams=1)))
    assert streamed == pretrained.generate(images[:1], [""], caption_config(num_beams=1))[0]


@NEEDS_BLIP2
def test_wrong_input(pretrained):
    image = reference.pictures()[0]
    with pytest.raises(UserError, match=r"text 0: .* tokens exceed the Q-Former's 64 positions"):
        pretrained.encode_text("word " * 100)
    with pytest.raises(UserError, match="2 images and 3 texts"):
        pretrained.itm_logits([image] * 2, ["a", "b", "c"])
    with pytest.raises(UserError, match="expected an image for each prompt"):
        pretrained.generate(None, ["a"])
    with pytest.raises(UserError, match="no texts"):
        pretrained.encode_text([])
    for scheme in ("int8", "float8"):
        with pytest.raises(UserError, match=f"'{scheme}': a blip2-qformer model cannot be quant"):
            load_model(reference.shared("pretrain"), quantize=scheme)


@NEEDS_BLIP2
def test_many_pairs_are_read_some_at_a_time(pretrained, monkeypatch):
    """Vision tokens of all pairs of a benchmark would not fit into memory."""
    taken = []

    class Counted(np.ndarray):
        def __getitem__(self, index):
            taken.append(len(index))
            return np.asarray(self)[index]

    texts = ["a dog", "two men and a boat", "a", "a cat on a table", "a train"]
    features = pretrained.encode_image(reference.pictures()[:3])
    expected, read = pretrained.retrieve(features, texts), pretrained.encode_text(texts)
    for name, size in (("PAIR_BATCH", 4), ("TEXT_BATCH", 2), ("IMAGE_BLOCK", 2)):
        monkeypatch.setattr(qformer_model, name, size)
    counted = features._replace(vision=features.vision.view(Counted))
    for found, wanted in zip(pretrained.retrieve(counted, texts), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert taken == [4, 4, 4, 3]
    again = pretrained.encode_text(texts)
    assert (again.lengths == read.lengths).all() and again.embeds.shape == read.embeds.shape
    for row, length in enumerate(read.lengths):
        np.testing.assert_allclose(again.embeds[row, :length], read.embeds[row, :length], atol=1e-5)


def test_rerank_scores_each_pair_once():
    asked = []

    def match(pairs):
        asked.extend(map(tuple, pairs.tolist()))
        return np.arange(len(pairs), dtype=np.float32)

    similarities = np.array([[0.9, 0.1, 0.5], [0.8, 0.7, 0.2]], np.float32)
    scores = rerank(similarities, match, 1)
    # image 0 and 1 find text 0; texts 0, 1, 2 find images 0, 1, 0
    assert asked == [(0, 0), (0, 2), (1, 0), (1, 1)]
    np.testing.assert_allclose(scores.image_to_text, [[0.9, -100, -100], [2.8, -100, -100]])
    np.testing.assert_allclose(scores.text_to_image, [[0.9, -100], [-100, 3.7], [1.5, -100]])
    metrics = recall(scores, [[0], [1, 2]], [0, 1, 0])
    assert metrics["text_r1"] == 50.0 and metrics["image_r1"] == 100.0
    with pytest.raises(UserError, match="truth for 1 images"):
        recall(scores, [[0]], [0, 1, 0])
