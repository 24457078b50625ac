"""From `convert build` to tokens, against what the original PyTorch code computed.

../shared/reference holds the original's dumps; without it test_oracle.py stands in for them.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import oracle
from helpers.paths import REFERENCE

from minigpt4_jax.checkpoint import model_directory
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.parameters import named_tensors
from minigpt4_jax.inference import engine
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.loading import load
from minigpt4_jax.inference.sampling import SamplingParams
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.processing.images import load_pixels, normalize
from minigpt4_jax.processing.sequences import (
    build_conversation_row,
    build_row,
    prompt_tokens,
    stop_sequences,
)

pytestmark = pytest.mark.default_compiler

NEEDS_DUMPS = pytest.mark.skipif(
    not (REFERENCE / "dumps").is_dir(), reason="../shared/reference is not here"
)
CASES = {
    "a": ("minigpt4-vicuna", "a_minigpt4_vicuna.pth", 56, 20, ["qformer.heads=4"]),
    "b": ("minigpt4-llama2", "b_minigpt4_llama2.pth", 56, 20, []),
    "c": ("minigpt-v2", "c_minigptv2.pth", 112, 40, ["lora.alpha=16"]),
}


class Case:
    """One converted reference model with its dumps."""

    def __init__(self, name, folder):
        from convert.build import build
        from convert.build_plan import BuildRequest

        self.name = name
        variant, checkpoint, size, text, extra = CASES[name]
        files = REFERENCE / "checkpoints"
        out = folder / name
        settings = [
            f"image_size={size}", f"max_text_length={text}", "vision.depth=3", "vision.heads=4",
            "end_symbol=" + ("###" if name == "a" else "</s>"), *extra,
        ]  # fmt: skip
        build(
            BuildRequest(
                variant, files / "llama", out, vision=files / "eva_vit_g.pth",
                qformer=files / "blip2_pretrained_flant5xxl.pth" if name == "a" else None,
                checkpoint=files / checkpoint, settings=settings,
            )
        )  # fmt: skip
        self.model = load(out, dtype="float32")
        self.config, self.tokenizer = self.model.config, self.model.tokenizer
        self.tensors = model_directory.Tensors(out)
        self.module, _ = load_model(out)
        self.pixels = self.arrays("pixels")
        self.images = [self.pixels["image_uint8_0"], self.pixels["image_uint8_1"]]

    def arrays(self, kind):
        return np.load(REFERENCE / "dumps" / f"{self.name}_{kind}.npz")

    def document(self, kind):
        return json.loads((REFERENCE / "dumps" / f"{self.name}_{kind}.json").read_text())

    def forwards(self):
        """(dump, row of each sample, images) of every training forward pass."""
        for path in sorted((REFERENCE / "dumps").glob(f"{self.name}_forward_*.npz")):
            kind = path.stem[2:]
            document = self.document(kind)
            samples = document["samples"]
            images = 1 if "image" in samples else 0
            yield kind, np.load(path), self._rows(samples, document["extra"], images), images

    def _rows(self, samples, extra, images):
        if "conv_q" in samples:
            conversations = zip(samples["conv_q"], samples["conv_a"], strict=True)
            sign = samples["connect_sym"][0]
            return [
                build_conversation_row(
                    self.tokenizer, self.config, q.split(sign), a.split(sign), images=images
                )
                for q, a in conversations
            ]
        answers = samples["answer"]
        prompts = samples.get("instruction_input") or [extra["prompt"]] * len(answers)
        if self.name == "c":
            prompts = [self.config.prompt_template.replace("{}", p) for p in prompts]
        return [
            build_row(self.tokenizer, self.config, p, a, images=images)
            for p, a in zip(prompts, answers, strict=True)
        ]

    def batch(self, rows, images):
        """The rows in the original's padding: to its longest prompt and its longest answer."""
        tokens = np.zeros((len(rows), max(len(r.tokens) for r in rows)), np.int32)
        answers = np.full((len(rows), max(len(r.label_positions) for r in rows)), -1, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row.tokens)] = row.tokens
            answers[i, : len(row.label_positions)] = row.label_positions
        pixels = self.pixels["pixel_values"].transpose(0, 2, 3, 1)[:, None]
        lengths = np.array([len(r.tokens) for r in rows], np.int32)
        return Batch(pixels if images else pixels[:, :0], tokens, lengths, answers)


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("models"))


def relative(ours, theirs):
    theirs = np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()


@NEEDS_DUMPS
def test_pixels_are_equal(case):
    theirs = case.pixels["pixel_values"].transpose(0, 2, 3, 1)
    for image, wanted in zip(case.images, theirs, strict=True):
        small = load_pixels(image, case.config.vision.image_size)
        np.testing.assert_array_equal(normalize(small), wanted)


@NEEDS_DUMPS
def test_each_layer_of_the_vision_side(case):
    dump, model = case.arrays("vision"), case.module
    np.testing.assert_allclose(np.asarray(model.vit.pos[...]), dump["pos_embed"][0], atol=1e-6)
    pixels = jnp.asarray(case.pixels["pixel_values"].transpose(0, 2, 3, 1))
    assert relative(model.vit.embed(pixels), dump["patch_embed"]) < 1e-4
    x = model.vit.embed(pixels)
    x = jnp.concatenate([jnp.broadcast_to(model.vit.cls[...], (2, 1, 64)), x], 1)
    x = x + model.vit.pos[...]
    graphdef, state = nnx.split(model.vit.blocks)
    for i in range(case.config.vision.depth):
        x = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))(x)
        assert relative(x, dump[f"block{i}"]) < 1e-4
    assert relative(model.vit(pixels), dump["vit"]) < 1e-4
    vision = model.ln_vision(x)
    assert relative(vision, dump["ln_vision"]) < 1e-4
    if model.qformer is not None:
        y = model.qformer.norm(model.qformer.query[...])
        y = jnp.broadcast_to(y, (2, *y.shape))
        for i, block in enumerate(model.qformer.blocks):
            y, _ = block(y, vision, None, queries=y.shape[1])
            assert relative(y, dump[f"qformer_layer{i}"]) < 1e-4
    assert relative(case.model.encode_images(case.images), dump["inputs_llama"]) < 1e-4


@NEEDS_DUMPS
def test_training_forward(case):
    for kind, dump, rows, images in case.forwards():
        batch = case.batch(rows, images)
        model = case.module
        pixels, tokens, lengths = map(jnp.asarray, (batch.pixels, batch.tokens, batch.lengths))
        embeds = model.merge(tokens, model.encode(pixels))
        logits = model(pixels, tokens, lengths)
        np.testing.assert_array_equal(dump["attention_mask"].sum(1), batch.lengths, kind)
        for i, (row, n) in enumerate(zip(rows, batch.lengths, strict=True)):
            assert relative(embeds[i, :n], dump["inputs_embeds"][i, :n]) < 1e-4, kind
            assert relative(logits[i, :n], dump["logits"][i, :n]) < 1e-4, kind
            labelled = np.flatnonzero(dump["targets"][i] != -100)
            assert labelled.tolist() == row.label_positions, kind
            assert dump["targets"][i, labelled].tolist() == [
                row.tokens[a] for a in row.label_positions
            ]
        nll = np.asarray(model.token_nll(batch))
        loss = nll.sum() / (batch.label_positions >= 0).sum()
        assert loss == pytest.approx(float(dump["loss"]), rel=1e-5), kind
        ranking = nll.sum(1) / (dump["targets"].shape[1] - 1)  # the original's padded length
        np.testing.assert_allclose(ranking, dump["loss_none"], rtol=1e-5, err_msg=kind)


@NEEDS_DUMPS
def test_score_and_ranking_loss(case):
    for kind, dump, rows, images in case.forwards():
        if "conv" in kind:
            continue
        document = case.document(kind)
        samples = document["samples"]
        prompts = samples.get("instruction_input") or [document["extra"]["prompt"]] * 2
        if case.name == "c":
            prompts = [case.config.prompt_template.replace("{}", p) for p in prompts]
        pictures = case.images if images else None
        nll, tokens = case.model.score(pictures, prompts, samples["answer"])
        assert tokens.tolist() == [len(row.label_positions) for row in rows]
        assert nll.sum() / tokens.sum() == pytest.approx(float(dump["loss"]), rel=1e-5), kind
        ranking = case.model.candidate_loss(pictures, prompts, samples["answer"])
        np.testing.assert_allclose(ranking, dump["loss_none"], rtol=1e-5)


@NEEDS_DUMPS
def test_gradients(case):
    def wanted(path, _):
        return path[0] == "projection" or "lora" in path[-1]

    graphdef, trainable, frozen = nnx.split(case.module, wanted, ...)
    for kind, dump, rows, images in case.forwards():
        batch = case.batch(rows, images)
        grads = jax.grad(lambda t, b=batch: nnx.merge(graphdef, t, frozen).loss(b))(trainable)
        ours = dict(named_tensors(grads))
        for name, grad in ours.items():
            parts = name.replace("projection", "llama_proj").split(".")
            if parts[0] == "llm":
                which = parts[-1][-1].upper()
                parts = [
                    "llama_model.base_model.model.model.layers", parts[2], "self_attn",
                    f"{parts[4]}_proj", f"lora_{which}", "weight",
                ]  # fmt: skip
            key = "grad/" + ".".join(parts)
            if images or parts[0] != "llama_proj":
                assert relative(grad, dump[key]) < 1e-4, (kind, name)
            else:  # text alone teaches the projection nothing
                assert key not in dump and not grad.any()


def generation(case, run, document, visual):
    """The requests of one run, and its end ids. The original's ids begin with a BOS, which its
    min_length counts; a hypothesis's length in beam search counts it too, here as there."""
    kwargs = run["kwargs"]
    options = SamplingParams(
        repetition_penalty=kwargs.get("repetition_penalty", 1.0),
        min_new_tokens=max(0, kwargs.get("min_length", 0) - 1),
    )
    beams = BeamSearchConfig(kwargs["num_beams"], kwargs.get("length_penalty", 1.0))
    ends = run["eos"] if isinstance(run["eos"], list) else [run["eos"]]
    requests = [
        engine.Request(
            prompt_tokens(case.tokenizer, case.config, text, images=1), visual[i],
            kwargs["max_new_tokens"], options,
            stop_sequences=[[e] for e in ends], beam_search=beams,
        )
        for i, text in enumerate(document["texts"])
    ]  # fmt: skip
    return requests, ends


@NEEDS_DUMPS
@pytest.mark.parametrize("stacked", [False, True])
def test_greedy_ids(case, stacked):
    """Every run without beams; equal also where the original counts its leading BOS (min_length)."""
    document, dump = case.document("generate"), case.arrays("generate")
    runner = engine.Engine(case.module) if stacked else case.model.engine
    visual = case.model.encode_images(case.images)
    for name, run in document["runs"].items():
        requests, _ = generation(case, run, document, visual)
        if requests[0].beam_search.num_beams > 1:
            continue
        for found, padded in zip(runner.generate(requests), dump[f"{name}/ids"], strict=True):
            theirs = padded[1:].tolist()  # without the leading BOS
            assert found == theirs[: len(found)], name
            assert not any(theirs[len(found) :]), name  # finished rows are padded with 0


@NEEDS_DUMPS
@pytest.mark.parametrize("stacked", [False, True])
def test_beam_ids_and_scores(case, stacked):
    """Every run with beams, its two prompts in one batch; some end early, some at the limit."""
    document, dump = case.document("generate"), case.arrays("generate")
    runner = engine.Engine(case.module) if stacked else case.model.engine
    visual = case.model.encode_images(case.images)
    seen = 0
    for name, run in document["runs"].items():
        requests, ends = generation(case, run, document, visual)
        if requests[0].beam_search.num_beams == 1:
            continue
        found = runner.search(requests)
        for (answer,), padded in zip(found, dump[f"{name}/ids"], strict=True):
            theirs = padded[1:].tolist()
            ours = answer.ids
            if answer.hit_stop:  # the original writes its first end id for whichever came
                assert ours[-1] in ends
                ours = [*ours[:-1], ends[0]]
            assert ours == theirs[: len(ours)], name
            assert not any(theirs[len(ours) :]), name
        scores = [answer.score for (answer,) in found]
        np.testing.assert_allclose(scores, dump[f"{name}/sequences_scores"], rtol=1e-4)
        seen += 1
    assert seen == 6


@NEEDS_DUMPS
def test_generated_text(case):
    document = case.document("generate")
    texts = case.model.generate(case.images, document["texts"], max_new_tokens=10)
    assert texts == document["runs"]["greedy"]["answers"]
    for name in ("greedy_rp_eos", "beam4_lpneg_eos"):
        run, ids = document["runs"][name], case.arrays("generate")[f"{name}/ids"]
        options = {k: v for k, v in run["kwargs"].items() if k not in ("do_sample", "min_length")}
        options |= {"compat": True, "stop_ids": run["eos"]}
        options |= {"min_new_tokens": run["kwargs"].get("min_length", 0)}
        found = case.model.generate_details(case.images, document["texts"], **options)
        for (answer,), theirs in zip(found, ids[:, 1:].tolist(), strict=True):
            count = len(answer.ids) - (answer.finish_reason == "stop")
            assert answer.ids[:count] == theirs[:count], name
            assert count == len(theirs) or answer.ids[-1] in run["eos"], name


@NEEDS_DUMPS
def test_chat_turns(case):
    """Two turns about one image, the second after the first one's answer."""
    from minigpt4_jax.processing.chat_templates import chat_format, with_images

    dump, turns = case.arrays("chat"), []
    image = case.images[1 if case.name == "b" else 0]
    visual = case.model.encode_images([image])[0]
    assert relative(visual, dump["img_emb"][0]) < 1e-4
    for n, turn in enumerate(case.document("chat")):
        question = turn["question"] if n else with_images(turn["question"], 1)
        turns.append((question, None))
        prompt = chat_format(case.config, case.tokenizer).render(turns)
        if case.name != "c":  # its demo overwrites the answers it keeps: a fault not to copy
            assert prompt == turn["prompt"]
        tokens = prompt_tokens(case.tokenizer, case.config, turn["prompt"], images=1)
        flat = [i for segment in turn["segment_ids"] for i in segment]
        assert [t for t in tokens if t >= 0] == flat
        embeds = case.module.merge(jnp.asarray([tokens]), jnp.asarray(visual[None]))
        assert relative(embeds, dump[f"turn{n}/embs"]) < 1e-4
        theirs = dump[f"turn{n}/ids"][1:].tolist()
        stops = stop_sequences(case.tokenizer, case.config.end_symbol)
        options = SamplingParams(repetition_penalty=1.05)  # the chat's default
        request = engine.Request(tokens, visual, len(theirs), options, stop_sequences=stops)
        assert case.model.engine.generate([request])[0] == theirs
        turns[-1] = (question, turn["answer"])


@NEEDS_DUMPS
def test_conversation(case):
    """The public Conversation gives the dumps' answers."""
    talk, dump = case.model.conversation(), case.arrays("chat")
    images = [case.images[1 if case.name == "b" else 0]]
    for n, turn in enumerate(case.document("chat")):
        limit = len(dump[f"turn{n}/ids"]) - 1
        options = {"repetition_penalty": 1.05, "max_new_tokens": limit}
        assert talk.ask(turn["question"], [] if n else images, **options) == turn["answer"]


@NEEDS_DUMPS
def test_oracle_agrees_with_the_original(case):
    dump = case.arrays("vision")
    pixels = case.pixels["pixel_values"].transpose(0, 2, 3, 1)
    visual = np.stack([oracle.encode(case.tensors, case.config, p) for p in pixels])
    assert relative(visual, dump["inputs_llama"]) < 1e-5
    _, forward, rows, images = next(case.forwards())
    for i, row in enumerate(rows):
        seen = visual[i] if images else None
        scores = oracle.logits(case.tensors, case.config, row.tokens, seen)
        assert relative(scores, forward["logits"][i, : len(row.tokens)]) < 1e-4
