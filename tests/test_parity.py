"""From `convert build` to tokens, against what the original PyTorch code computed.

../shared/reference holds the original's dumps; without it test_oracle.py stands in for them. Here is what
users' programs compute; test_parity_answers.py has conversations and beam search, compiled quickly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers.reference_models import CASES, NEEDS_DUMPS, Case, generation, relative

from minigpt4_jax.checkpoint.parameters import named_tensors
from minigpt4_jax.inference import engine
from minigpt4_jax.processing.images import load_pixels, normalize

pytestmark = pytest.mark.default_compiler


@pytest.fixture(scope="module", params=list(CASES))
def case(request):
    return Case(request.param)


@pytest.fixture(scope="module")
def passes(case):
    """What one program gives for each dump of a training pass: (the dump's kind, dump, rows, images, batch,
    (embeddings, logits, NLL of each token), gradients)."""

    def wanted(path, _):
        return path[0] == "projection" or "lora" in path[-1]

    graphdef, trainable, frozen = nnx.split(case.module, wanted, ...)

    def loss(trainable, frozen, batch):
        model = nnx.merge(graphdef, trainable, frozen)
        embeds = model.merge(batch.tokens, model.encode(batch.pixels))
        logits = model(batch.pixels, batch.tokens, batch.lengths)
        return model.loss(batch), (embeds, logits, model.token_nll(batch))

    run, found = jax.jit(jax.grad(loss, has_aux=True)), []
    for kind, dump, rows, images in case.forwards():
        batch = case.batch(rows, images)
        grads, outputs = run(trainable, frozen, batch)
        found.append((kind, dump, rows, images, batch, outputs, dict(named_tensors(grads))))
    return found


@NEEDS_DUMPS
def test_pixels_are_equal(case):
    theirs = case.pixels["pixel_values"].transpose(0, 2, 3, 1)
    for image, wanted in zip(case.images, theirs, strict=True):
        small = load_pixels(image, case.config.vision.image_size)
        np.testing.assert_array_equal(normalize(small), wanted)


@jax.jit
def vision_layers(model, pixels):
    """What each layer of the vision side computes, by its name in the dump."""
    x = model.vit.embed(pixels)
    found = {"patch_embed": x, "vit": model.vit(pixels)}
    cls = jnp.broadcast_to(model.vit.cls[...], (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([cls, x], 1)
    x = x + model.vit.pos[...]
    graphdef, state = nnx.split(model.vit.blocks)
    for i in range(model.config.vision.depth):
        x = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], state))(x)
        found[f"block{i}"] = x
    found["ln_vision"] = vision = model.ln_vision(x)
    if model.qformer is not None:
        y = model.qformer.norm(model.qformer.query[...])
        y = jnp.broadcast_to(y, (len(x), *y.shape))
        for i, block in enumerate(model.qformer.blocks):
            y, _ = block(y, vision, None, queries=y.shape[1])
            found[f"qformer_layer{i}"] = y
    return found


@NEEDS_DUMPS
def test_each_layer_of_the_vision_side(case):
    dump, model = case.arrays("vision"), case.module
    np.testing.assert_allclose(np.asarray(model.vit.pos[...]), dump["pos_embed"][0], atol=1e-6)
    pixels = case.pixels["pixel_values"].transpose(0, 2, 3, 1)
    found = vision_layers(model, pixels)
    assert found.keys() == set(dump) - {"pos_embed", "atts_llama", "inputs_llama"}
    for name, values in found.items():
        assert relative(values, dump[name]) < 1e-4, name
    assert relative(case.model.encode_images(case.images), dump["inputs_llama"]) < 1e-4


@NEEDS_DUMPS
def test_training_forward(passes):
    for kind, dump, rows, _, batch, (embeds, logits, nll), _ in passes:
        np.testing.assert_array_equal(dump["attention_mask"].sum(1), batch.lengths, kind)
        for i, (row, n) in enumerate(zip(rows, batch.lengths, strict=True)):
            assert relative(embeds[i, :n], dump["inputs_embeds"][i, :n]) < 1e-4, kind
            assert relative(logits[i, :n], dump["logits"][i, :n]) < 1e-4, kind
            labelled = np.flatnonzero(dump["targets"][i] != -100)
            assert labelled.tolist() == row.label_positions, kind
            assert dump["targets"][i, labelled].tolist() == [
                row.tokens[a] for a in row.label_positions
            ]
        nll = np.asarray(nll)
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
def test_gradients(passes):
    for kind, dump, _, images, _, _, gradients in passes:
        for name, grad in gradients.items():
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


@NEEDS_DUMPS
@pytest.mark.parametrize("stacked", [False, True])
def test_greedy_ids(case, stacked):
    """Every run without beams; equal also where the original counts its leading BOS (min_length)."""
    document, dump = case.document("generate"), case.arrays("generate")
    runner = engine.Engine(case.module) if stacked else case.model.engine
    visual = case.model.encode_images(case.images)
    names = [name for name, run in document["runs"].items() if run["kwargs"]["num_beams"] == 1]
    requests = [generation(case, document["runs"][name], document, visual)[0] for name in names]
    ids = iter(runner.generate([request for of_run in requests for request in of_run]))
    assert len(names) == 4
    for name in names:  # all runs together, so that they share the programs
        for padded in dump[f"{name}/ids"]:
            found, theirs = next(ids), padded[1:].tolist()  # without the leading BOS
            assert found == theirs[: len(found)], name
            assert not any(theirs[len(found) :]), name  # finished rows are padded with 0
