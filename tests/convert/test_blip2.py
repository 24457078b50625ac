"""Files of BLIP-2 with a missing, foreign or wrongly shaped tensor, and T5 with tied embeddings."""

import json

import numpy as np
import pytest
from helpers import blip2_reference as reference
from helpers.blip2_reference import NEEDS_BLIP2

from convert.blip2_plan import make_blip2_plan
from convert.build_plan import BuildRequest
from minigpt4_jax.errors import UserError

torch = pytest.importorskip("torch")
pytestmark = NEEDS_BLIP2
FILES = {
    "blip2-qformer": ("blip2_finetune_coco.pth", {"tokenizer": reference.BERT}),
    "blip2-opt": ("blip2_caption_opt.pth", {"llm": reference.CHECKPOINTS / "opt"}),
}
SCALAR = torch.zeros(())


@pytest.mark.parametrize(
    ("variant", "key", "change", "message"),
    [
        ("blip2-qformer", "vision_proj.weight", None, "has no vision_proj.weight"),
        ("blip2-qformer", "Qformer.cls.predictions.bias", None, "has no Qformer.cls.predictions.bias"),
        ("blip2-qformer", "visual_encoder.pos_embed", None, "no position embedding (pos_embed)"),
        (
            "blip2-qformer", "Qformer.bert.encoder.layer.0.crossattention.self.key.weight", None,
            "has no Qformer.bert.encoder.layer.0.crossattention.self.key.weight",
        ),
        ("blip2-opt", "query_tokens", None, "expected query_tokens"),
        ("blip2-opt", "opt_proj.bias", None, "has no opt_proj.bias"),
        ("blip2-opt", "itm_head.weight", torch.zeros(2, 32), "unknown key itm_head.weight"),
        ("blip2-qformer", "query_tokens", torch.zeros(31), "query_tokens has shape (31,)"),
        ("blip2-qformer", "itm_head.weight", torch.zeros(1, 32), "expected (2, 32)"),
        ("blip2-qformer", "vision_proj.weight", SCALAR, "vision_proj.weight has shape (), expected"),
        ("blip2-qformer", "visual_encoder.cls_token", SCALAR, "visual_encoder.cls_token has shape ()"),
        ("blip2-qformer", "visual_encoder.pos_embed", torch.zeros(0, 17, 32), "expected (17, 32)"),
        (
            "blip2-qformer", "visual_encoder.patch_embed.proj.weight", SCALAR,
            "(patch_embed.proj.weight) has shape ()",
        ),
        (
            "blip2-opt", "visual_encoder.blocks.0.mlp.fc1.weight", SCALAR,
            "visual_encoder.blocks.0.mlp.fc1.weight has shape ()",
        ),
        (
            "blip2-qformer", "Qformer.bert.embeddings.position_embeddings.weight", SCALAR,
            "position_embeddings.weight has shape ()",
        ),
    ],
)  # fmt: skip
def test_the_tensor_at_fault_is_named(tmp_path, variant, key, change, message):
    name, arguments = FILES[variant]
    state = torch.load(reference.CHECKPOINTS / name, weights_only=True)["model"]
    state = {k: v for k, v in state.items() if k != key} | ({} if change is None else {key: change})
    torch.save({"model": state}, tmp_path / "file.pth")
    request = {"llm": None, "checkpoint": tmp_path / "file.pth", "settings": reference.HEADS}
    with pytest.raises(UserError) as error:
        make_blip2_plan(BuildRequest(variant, out=tmp_path / "x", **(request | arguments)))
    assert message in str(error.value)


def test_a_vision_encoder_that_is_not_used_is_noted(tmp_path):
    name, arguments = FILES["blip2-qformer"]
    request = {"llm": None, "checkpoint": reference.CHECKPOINTS / name, "vision": reference.VIT}
    request |= {"settings": reference.HEADS, "out": tmp_path / "x", **arguments}
    plan = make_blip2_plan(BuildRequest("blip2-qformer", **request))
    assert any("eva_vit_g.pth is not used: a later file" in note for note in plan.notes)


@pytest.mark.parametrize("by_config", [True, False])
def test_t5_without_lm_head_uses_its_embedding(tmp_path, by_config):
    """transformers 5 ties the embeddings of every T5, whose lm_head.weight it then does not save."""
    from safetensors.numpy import load_file, save_file

    source = reference.CHECKPOINTS / "hf/flan-t5"
    for path in source.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tensors = load_file(source / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    (tmp_path / "model.safetensors").unlink()
    save_file(tensors, tmp_path / "model.safetensors")
    if by_config:  # as transformers 5 writes it
        config = json.loads((source / "config.json").read_text())
        config["text_config"] |= {"tie_word_embeddings": True, "scale_decoder_outputs": False}
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps(config))
    request = BuildRequest("blip2-flant5", None, tmp_path / "x", checkpoint=tmp_path)
    plan = make_blip2_plan(request)
    assert plan.config.llm.tie and not plan.config.llm.scaled
    assert "llm.head.weight" not in plan.shapes
    assert any("no lm_head.weight: the embedding is used" in note for note in plan.notes)
    assert plan.sources["llm.embed"].key == "language_model.shared.weight"
    assert np.prod(plan.shapes["llm.embed"]) > 0
