"""The same models and training step in PyTorch, for other benchmarks; not run by hand.

The language model is the LLaMA of transformers, the vision side is written here. Weights have this project's
names. Those of a training step come from `sizes.tensor`, so that both sides have the same numbers.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sizes import tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.config import IMAGE, LlmConfig, ModelConfig
from minigpt4_jax.models.minigpt import LN_VISION_EPS, Batch

Weights = dict[str, torch.Tensor]


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    weight = w[f"{name}.weight"]
    bias = w.get(f"{name}.bias")
    return F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))


def norm(w: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], w[f"{name}.scale"], w[f"{name}.bias"], eps)


def heads(x: torch.Tensor, n: int) -> torch.Tensor:
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def vit(w: Weights, config: ModelConfig, pixels: torch.Tensor) -> torch.Tensor:
    """pixels [B, S, S, 3] -> [B, 1 + patches, D] float32, after ln_vision."""
    c = config.vision
    kernel = w["vit.patch.weight"].view(c.width, 3, c.patch_size, c.patch_size)
    x = F.conv2d(pixels.permute(0, 3, 1, 2).to(kernel.dtype), kernel, stride=c.patch_size)
    x = x.flatten(2).transpose(1, 2).float() + w["vit.patch.bias"]
    x = torch.cat([w["vit.cls"].expand(len(x), 1, -1), x], 1) + w["vit.pos"]
    for i in range(c.depth):
        p = f"vit.blocks.{i}"
        q_bias, v_bias = w[f"{p}.attn.q_bias"], w[f"{p}.attn.v_bias"]
        qkv = linear(w, f"{p}.attn.qkv", norm(w, f"{p}.norm1", x, c.eps))
        qkv = qkv + torch.cat([q_bias, torch.zeros_like(q_bias), v_bias]).to(qkv.dtype)
        q, k, v = (heads(y, c.heads) for y in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(w, f"{p}.attn.out", y).float()
        y = F.gelu(linear(w, f"{p}.mlp.up", norm(w, f"{p}.norm2", x, c.eps)))
        x = x + linear(w, f"{p}.mlp.down", y).float()
    return norm(w, "ln_vision", x, LN_VISION_EPS)


def qformer(w: Weights, config: ModelConfig, vision: torch.Tensor) -> torch.Tensor:
    """vision tokens [B, T, Dv] -> query outputs [B, P, D] float32."""
    c = config.qformer
    assert c is not None

    def attend(p: str, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            heads(linear(w, f"{p}.{n}", y), c.heads)
            for n, y in (("q", x), ("k", source), ("v", source))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return norm(w, f"{p}.norm", x + linear(w, f"{p}.out", y).float(), c.eps)

    x = norm(w, "qformer.norm", w["qformer.query"], c.eps).expand(len(vision), -1, -1)
    for i in range(c.layers):
        p = f"qformer.blocks.{i}"
        x = attend(f"{p}.attn", x, x)
        if i % c.cross_every == 0:
            x = attend(f"{p}.cross", x, vision)
        y = linear(w, f"{p}.mlp.down", F.gelu(linear(w, f"{p}.mlp.up", x)))
        x = norm(w, f"{p}.mlp.norm", x + y.float(), c.eps)
    return x


HF_NAMES = {
    "norm1.scale": "input_layernorm.weight",
    "norm2.scale": "post_attention_layernorm.weight",
    "mlp.gate.weight": "mlp.gate_proj.weight",
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
} | {f"attn.{n}.weight": f"self_attn.{n}_proj.weight" for n in "qkvo"}


def hf_name(name: str) -> str:
    """Name of a language-model tensor here -> its name in transformers."""
    outside_layers = {
        "llm.head.weight": "lm_head.weight",
        "llm.embed": "model.embed_tokens.weight",
        "llm.norm.scale": "model.norm.weight",
    }
    if name in outside_layers:
        return outside_layers[name]
    _, _, layer, rest = name.split(".", 3)
    return f"model.layers.{layer}.{HF_NAMES[rest]}"


def hf_config(m: LlmConfig) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=m.vocab, hidden_size=m.width, intermediate_size=m.ffn, num_hidden_layers=m.layers,
        num_attention_heads=m.heads, num_key_value_heads=m.kv_heads, head_dim=m.head_dim,
        rms_norm_eps=m.eps, rope_theta=m.rope_theta, tie_word_embeddings=m.tie,
        max_position_embeddings=m.max_length, attn_implementation="sdpa", use_cache=False,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
    )  # fmt: skip


def load_weights(
    config: LlmConfig, tensors: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, Weights]:
    """The language model of a model directory's tensors for `generate`, and the other tensors in float32."""
    llm = LlamaForCausalLM(hf_config(config)).to(dtype).eval()
    llm.config.use_cache = True
    state, others = llm.state_dict(), {}
    for name in tensors:
        value = torch.from_numpy(np.asarray(tensors[name], np.float32))
        if name.startswith("llm."):
            state[hf_name(name)].copy_(value)
        else:
            others[name] = value
    llm.tie_weights()
    return llm, others


class TorchPeer:
    """One projection-only training step. labels_only: apply the output matrix to labelled positions only,
    as this project does; otherwise to every position, as transformers and the original do. weight: makes
    the weights, by default those of `sizes.tensor`."""

    def __init__(
        self,
        config: ModelConfig,
        batch: Batch,
        dtype: torch.dtype,
        device: str,
        weight: Callable[[str, tuple[int, ...]], torch.Tensor] | None = None,
    ):
        self.config, self.device, self.dtype = config, device, dtype
        shapes = parameter_shapes(config)
        with torch.device("meta"):
            self.llm = LlamaForCausalLM(hf_config(config.llm))
        self.llm.to(dtype).to_empty(device=device)
        self.llm.model.rotary_emb = type(self.llm.model.rotary_emb)(self.llm.config).to(device)
        self.llm.tie_weights()
        state = self.llm.state_dict()
        self.weights: Weights = {}
        for name, shape in shapes.items():
            value = torch.from_numpy(tensor(name, shape)) if weight is None else weight(name, shape)
            if name.startswith("llm."):
                state[hf_name(name)].copy_(value)
            else:
                matrix = name.endswith("weight") and not name.startswith("projection")
                self.weights[name] = value.to(device, dtype if matrix else torch.float32)
        self.llm.requires_grad_(False).eval()
        self.trained = [
            self.weights[f"projection.{n}"].requires_grad_() for n in ("weight", "bias")
        ]
        groups = [
            {"params": [p], "weight_decay": 0.05 if p.ndim > 1 else 0.0} for p in self.trained
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=3e-5)
        self.set_batch(batch)

    def set_batch(self, batch: Batch) -> None:
        tokens = torch.from_numpy(np.asarray(batch.tokens)).long().to(self.device)
        lengths = torch.from_numpy(np.asarray(batch.lengths)).to(self.device)
        label_positions = torch.from_numpy(np.asarray(batch.label_positions)).long().to(self.device)
        self.pixels = torch.from_numpy(np.asarray(batch.pixels)[:, 0]).to(self.device)
        self.image_slots = tokens == IMAGE
        self.tokens = tokens.masked_fill(self.image_slots, 0)
        self.attention_mask = torch.arange(tokens.shape[1], device=self.device) < lengths[:, None]
        is_label = torch.zeros_like(self.attention_mask)
        rows, columns = torch.nonzero(label_positions >= 0, as_tuple=True)
        is_label[rows, label_positions[rows, columns]] = True
        self.labels = self.tokens.masked_fill(~is_label, -100)

    def loss(self, labels_only: bool) -> torch.Tensor:
        with torch.no_grad():
            vision = vit(self.weights, self.config, self.pixels)
            visual = qformer(self.weights, self.config, vision)
        visual = F.linear(visual, *self.trained).to(self.dtype)
        embeds = self.llm.get_input_embeddings()(self.tokens)
        embeds = embeds.masked_scatter(self.image_slots[..., None], visual)
        if not labels_only:
            return self.llm(
                inputs_embeds=embeds, attention_mask=self.attention_mask, labels=self.labels
            ).loss
        hidden = self.llm.model(
            inputs_embeds=embeds, attention_mask=self.attention_mask
        ).last_hidden_state
        is_label = self.labels[:, 1:] >= 0
        logits = self.llm.lm_head(hidden[:, :-1][is_label]).float()
        return F.cross_entropy(logits, self.labels[:, 1:][is_label])

    def step(self, labels_only: bool) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(labels_only)
        loss.backward()
        self.optimizer.step()
        return loss.detach()
