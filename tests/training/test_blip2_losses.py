"""Losses and gradients of both stages of BLIP-2, against LAVIS on one process and on two."""

from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import blip2_reference as reference
from helpers.blip2_reference import NEEDS_BLIP2

from convert.blip2_keys import STAGE1, STAGE2_OPT, STAGE2_T5
from convert.export import original_shape
from convert.key_mapping import original_key
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import tokenizer_dir
from minigpt4_jax.checkpoint.parameters import is_stacked, layer_names
from minigpt4_jax.config import (
    QFORMER_LLM,
    LlmConfig,
    ModelConfig,
    QFormerConfig,
    TokenizerConfig,
    VisionConfig,
)
from minigpt4_jax.data.batching import pad_sequences
from minigpt4_jax.models.minigpt import Batch, Dropout
from minigpt4_jax.models.qformer import QFormer
from minigpt4_jax.models.stage1 import Stage1
from minigpt4_jax.models.stage1_losses import (
    Negatives,
    Similarities,
    draw_negatives,
    stage1_losses,
)
from minigpt4_jax.processing.sequences import build_row
from minigpt4_jax.processing.tokenizer import load_tokenizer
from minigpt4_jax.training.train_step import split_model, trained_parts

pytestmark = NEEDS_BLIP2


class Case:
    """A converted model, split for training, its tokenizer and key table."""

    def __init__(self, name, table, *, freeze_vit, **settings):
        directory = reference.shared(name)
        model, self.config = load_model(directory, "float32")
        self.config = self.config.__class__(**(vars(self.config) | settings))
        parts = trained_parts(freeze_vit=freeze_vit, freeze_qformer=False, config=self.config)
        self.split = split_model(model, parts, np.float32)
        self.tokenizer = load_tokenizer(tokenizer_dir(directory), self.config.tokenizer.kind)
        self.table = table

    def batch(self, size, index, captions, prompts=None, image_ids=None):
        rows = [
            build_row(self.tokenizer, self.config, prompt, caption, images=1)
            for caption, prompt in zip(captions, prompts or [None] * len(captions), strict=True)
        ]
        arrays, _ = reference.dump("pixels")
        name = "pixel_values" if size == "pretrain" else "pixel_values_coco"
        pixels = arrays[name][index].transpose(0, 2, 3, 1)[:, None]
        ids = None if image_ids is None else np.asarray(image_ids, np.int32)
        return Batch(pixels, *pad_sequences(rows, self.tokenizer.pad_id), image_ids=ids)

    @cached_property
    def stage1(self):
        """The losses of stage 1 and their gradients, of rows in two groups. ranks: 1 if the second group has
        no labels, and so halves the mean over groups. All dumps of a model share the program."""

        def losses(trainable, frozen, batch, negatives, ranks):
            model = self.split.join(trainable, frozen)
            found = stage1_losses(model, batch, negatives=negatives, num_groups=2)
            found = found._replace(captioning=found.captioning * 2 / ranks)
            return found.total, found

        run = jax.jit(jax.value_and_grad(losses, has_aux=True))

        def of_ranks(batch, negatives, *, ranks):
            batch, negatives = in_groups(batch, negatives, ranks)
            return run(self.split.trainable, self.split.frozen, batch, negatives, float(ranks))

        return of_ranks

    def original(self, gradients):
        """Gradients by the original's names."""
        named = {}
        for name, value in gradients.items():
            path = tuple(name.split("."))
            for i, (tensor, _) in enumerate(layer_names(path, value.shape)):
                layer = np.asarray(value[i] if is_stacked(path) else value)
                shape = original_shape(tensor, layer.shape, self.config)
                named[original_key(self.table, tensor)] = layer.reshape(shape)
        return named


def in_groups(batch, negatives, ranks, size=5):
    """The rows of each rank, as many, filled up to groups of equal size with rows without labels, which count
    nowhere; with one rank the second group has no others."""
    each = len(batch.tokens) // ranks
    places = [(rank, i) for rank in range(2) for i in range(size)]
    rows = np.array([min(i, each - 1) + min(rank, ranks - 1) * each for rank, i in places])
    is_filler = np.array([i >= each or rank >= ranks for rank, i in places])
    filled = jax.tree.map(lambda a: a[rows], batch)
    filled.label_positions[is_filler] = -1
    moved = [(row // each * size + row % each)[rows] for row in negatives]
    return filled, Negatives(*moved)


def check_gradients(named, expected, prefix="grad/"):
    """Each tensor's largest error is at most 1e-4 of its largest gradient.

    The biases of keys have no gradient, as they change all scores of a query alike: only rounding, which is
    compared with the largest gradient of the model.
    """
    wanted = {key.removeprefix(prefix): a for key, a in expected.items() if key.startswith(prefix)}
    assert len(wanted) > 5
    largest = max(np.abs(a).max() for a in wanted.values())
    for key, gradient in wanted.items():
        error, size = np.abs(named[key] - gradient).max(), np.abs(gradient).max()
        if key.endswith(".self.key.bias"):
            assert size < 1e-6 * largest > error, key
        else:
            assert error <= 1e-4 * size, f"{key}: {error:.2e} of {size:.2e}"


@pytest.fixture(scope="module")
def stage1():
    cases = {}

    def get(name):
        if name not in cases:
            cases[name] = Case(name, STAGE1, freeze_vit=name == "pretrain")
        return cases[name]

    return get


@pytest.mark.parametrize("dump", ["stage1_forward", "stage1_forward_b", "stage1_forward_coco"])
def test_stage1(stage1, dump):
    case = stage1("coco" if dump.endswith("coco") else "pretrain")
    expected, texts = reference.dump(dump)
    size = "coco" if dump.endswith("coco") else "pretrain"
    batch = case.batch(
        size, expected["image_index"], texts["text_input"], image_ids=texts["image_id"]
    )
    negatives = Negatives(expected["neg_image_for_text"], expected["neg_text_for_image"])
    assert batch.tokens.tolist() == expected["input_ids"].tolist()
    (total, found), gradients = case.stage1(batch, negatives, ranks=1)
    for name, value in (
        ("loss", total), ("loss_itc", found.contrastive), ("loss_itm", found.matching),
        ("loss_lm", found.captioning),
    ):  # fmt: skip
        assert float(value) == pytest.approx(texts["losses"][name], abs=1e-5), name
    named = case.original(gradients)
    check_gradients(named, expected)
    words = named["Qformer.bert.embeddings.word_embeddings.weight"]
    wanted = expected["grad_word_embeddings"]
    rows = words[expected["grad_word_embeddings_rows"]]
    np.testing.assert_allclose(rows, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def small_stage1():
    """A model whose losses depend on everything, and a batch of three rows."""
    vision = VisionConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, mlp=12)
    qformer = QFormerConfig(
        queries=2, hidden=8, layers=1, heads=2, ffn=12, vision_width=8, vocab=12, max_positions=6,
        itc_width=4, lm_head=True,
    )  # fmt: skip
    config = ModelConfig(
        "blip2-qformer",
        vision,
        qformer,
        LlmConfig(QFORMER_LLM),
        tokenizer=TokenizerConfig(bos_id=1),
    )
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Stage1(config, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda a: rng.normal(0.5, 0.5, a.shape).astype(np.float32), state)
    lengths = np.array([5, 3, 4], np.int32)
    labels = np.where(np.arange(5) < lengths[:, None], np.arange(5), -1)
    pixels = rng.normal(0, 1, (3, 1, 8, 8, 3)).astype(np.float32)
    batch = Batch(pixels, rng.integers(2, 12, (3, 5)), lengths, labels)
    return graphdef, state, batch, Negatives(np.array([1, 2, 0]), np.array([2, 0, 1]))


def test_dropout_follows_the_key():
    graphdef, state, batch, negatives = small_stage1()

    @jax.jit
    def losses(state, key):
        model = nnx.merge(graphdef, state)
        return stage1_losses(model, batch, negatives=negatives, dropout=Dropout(qformer=key))

    runs = [losses(state, jax.random.key(n)) for n in (0, 0, 1)]
    first, again, other = np.array([[float(loss) for loss in run] for run in runs])
    assert (first == again).all() and (np.abs(first - other) > 1e-4).all()


def test_rows_of_one_process_are_one_group():
    """By default the captioning loss is the mean over the tokens of all rows, however many each has; the
    other losses are the same in any groups, and with rows that fill them up."""
    graphdef, state, batch, negatives = small_stage1()

    @jax.jit
    def losses(state):
        model = nnx.merge(graphdef, state)
        one, all_apart = (
            stage1_losses(model, batch, negatives=negatives, **groups)
            for groups in ({}, {"num_groups": 3})
        )
        filled, moved = in_groups(batch, negatives, 1)
        return one, all_apart, stage1_losses(model, filled, negatives=moved, num_groups=2)

    one, apart, filled = losses(state)
    assert float(one.captioning) == pytest.approx(float(filled.captioning) * 2, rel=1e-5)
    assert abs(one.captioning - apart.captioning) > 1e-4
    for name in ("contrastive", "matching"):
        expected = pytest.approx(float(getattr(one, name)), rel=1e-5)
        assert float(getattr(apart, name)) == expected == float(getattr(filled, name)), name


PASSES = ["read_image", "read_text", "read_both", "write_text"]


def test_each_pass_has_a_dropout_key_of_its_own(stage1, monkeypatch):
    case = stage1("pretrain")
    batch = case.batch("pretrain", np.arange(3), ["a dog", "two men", "a boat"])
    keys = {}

    def recorded(name, read):
        def call(*args, dropout_key=None, **kwargs):
            keys[name] = dropout_key
            return read(*args, dropout_key=dropout_key, **kwargs)

        return call

    for name in PASSES:
        monkeypatch.setattr(QFormer, name, recorded(name, getattr(QFormer, name)))

    def losses(trainable, frozen, key):
        model = case.split.join(trainable, frozen)
        return stage1_losses(model, batch, dropout=Dropout(qformer=key))

    jax.eval_shape(losses, case.split.trainable, case.split.frozen, jax.random.key(0))
    assert set(keys) == set(PASSES) and None not in keys.values()
    assert len({id(key) for key in keys.values()}) == len(PASSES)


@pytest.mark.parametrize("layers", [0, 1])
def test_dropout_in_each_pass(layers):
    """Of the embeddings, which is all that a Q-Former without layers has, and of layers."""
    sizes = {"queries": 2, "hidden": 8, "heads": 2, "ffn": 12, "cross_every": 1, "vision_width": 6}
    config = QFormerConfig(layers=layers, vocab=5, max_positions=4, **sizes)
    qformer = QFormer(config, nnx.Rngs(0))
    if layers:
        qformer.rate = 0.0  # of the embeddings
    vision, tokens, lengths = jnp.ones((3, 4, 6)), jnp.ones((3, 4), int), jnp.array([4, 3, 4])

    @jax.jit
    def outputs(key):
        text = qformer.embed_text(tokens)
        image = [(jnp.ones((3, 2, 2, 4)),) * 2]
        return {
            "read_image": qformer.read_image(vision, dropout_key=key)[0],
            "read_text": qformer.read_text(text, lengths, dropout_key=key),
            "read_both": qformer.read_both(vision, text, lengths, dropout_key=key),
            "write_text": qformer.write_text(text, lengths, image, dropout_key=key)[0],
        }

    exact, random = outputs(None), outputs(jax.random.key(0))
    for name in PASSES:
        assert np.abs(exact[name] - random[name]).max() > 1e-2, name


def test_captions_of_an_image_share_their_targets(stage1):
    """Against LAVIS' formula, for two crops of one image. In the dumps, equal images have equal pixels, and
    then the loss is the same without shared targets."""
    case, ids = stage1("pretrain"), np.array([3, 5, 3, 5, 5])
    batch = case.batch(
        "pretrain", np.arange(5), ["a dog", "two men", "a boat", "a cat", "a train"], None, ids
    )

    @jax.jit
    def both(trainable, frozen, batch):
        model = case.split.join(trainable, frozen)
        negatives = Negatives(np.arange(5), np.arange(5))
        loss = stage1_losses(model, batch, negatives=negatives).contrastive
        images = model.image_features(batch.pixels[:, 0]).projected
        read = model.text_features(batch.tokens, batch.lengths).projected[:, 0]
        cosines = (images[:, None] @ read[..., None])[..., 0].max(axis=2)
        return loss, cosines / model.qformer.temperature[0]

    loss, scores = both(case.split.trainable, case.split.frozen, batch)
    same = ids[:, None] == ids
    targets = 0.9 * same / same.sum(axis=1, keepdims=True) + 0.1 / 5
    losses = [-(jax.nn.log_softmax(s) * targets).sum(axis=1).mean() for s in (scores, scores.T)]
    assert float(loss) == pytest.approx(float(sum(losses)) / 2, abs=1e-5)


def test_negatives_are_drawn_by_similarity():
    """As in LAVIS: an image for each text by text-to-image similarities, a text for each image by the others,
    never one of the same image."""
    similarities = Similarities(*np.random.default_rng(0).normal(0, 1.5, (2, 4, 4)))
    same = np.eye(4, dtype=bool)
    same[0, 1] = same[1, 0] = True
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: draw_negatives(similarities, same, key))(keys)
    for rows, scores in (
        (drawn.image_for_text, similarities.text_to_image),
        (drawn.text_for_image, similarities.image_to_text),
    ):
        share = (np.asarray(rows)[..., None] == np.arange(4)).mean(axis=0)
        expected = jax.nn.softmax(np.where(same, -np.inf, scores), axis=1)
        assert not share[same].any()
        np.testing.assert_allclose(share, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", ["pretrain", "coco"])
def test_stage1_of_two_processes(stage1, name):
    """What two processes of 3 rows compute together. (Two devices here: test_blip2_train.py.)"""
    case = stage1(name)
    suffix = "" if name == "pretrain" else "_coco"
    ranks = [reference.dump(f"stage1_2ranks{suffix}_rank{r}") for r in range(2)]

    def both(key):
        return np.concatenate([arrays[key] for arrays, _ in ranks])

    captions = [text for _, texts in ranks for text in texts["text_input"]]
    ids = both("image_id") if name == "coco" else None
    batch = case.batch(name, both("image_index"), captions, image_ids=ids)
    negatives = Negatives(both("neg_image_for_text"), both("neg_text_for_image"))

    mean = np.mean([texts["losses"]["loss"] for _, texts in ranks])
    (total, _), gradients = case.stage1(batch, negatives, ranks=2)
    assert float(total) == pytest.approx(mean, abs=1e-5)
    check_gradients(case.original(gradients), ranks[0][0], "grad_mean_over_ranks/")


@pytest.mark.parametrize(
    ("name", "dump"),
    [
        ("opt", "opt_forward"),
        ("opt-caption", "opt_forward_prompt"),
        ("flant5", "flant5_forward"),
        ("flant5-caption", "flant5_forward_prompt"),
    ],
)
def test_stage2(name, dump):
    expected, texts = reference.dump(dump)
    table = STAGE2_OPT if name.startswith("opt") else STAGE2_T5
    size = "coco" if name.endswith("caption") else "pretrain"
    prompt = {"caption_prompt": texts["prompt"]} if name == "opt-caption" else {}
    case = Case(name, table, freeze_vit=size == "pretrain", **prompt)
    samples = texts["samples"]
    captions = samples.get("text_output", samples["text_input"])
    prompts = samples["text_input"] if "text_output" in samples else None
    batch = case.batch(size, expected["image_index"], captions, prompts)

    def loss(trainable, frozen, batch):
        model = case.split.join(trainable, frozen)
        return model.loss_sums(batch)["loss"] / (batch.label_positions >= 0).sum()

    run = jax.jit(jax.value_and_grad(loss))
    value, gradients = run(case.split.trainable, case.split.frozen, batch)
    assert float(value) == pytest.approx(texts["loss"], abs=1e-5)
    check_gradients(case.original(gradients), expected)
