"""A training step of BLIP-2's first stage beside the original's way, written plainly in PyTorch.

    python benchmarks/blip2_stage1.py [--rounds=5] [--batch=8] [--layers=4] [--width=256] [--vision=256]
        [--one-core]

Both sides: a frozen vision encoder of 4 layers (images of 112 px), a Q-Former with 32 queries and text of
32 tokens, the three losses, backward pass and AdamW in float32 without dropout; random weights and data of
equal sizes. As in LAVIS the captioning pass reads the cached keys and values of the queries. Prints seconds
and their ratio; with --one-core CPU seconds of one core, for a busy machine.
"""

import time

import jax
import numpy as np
import torch
from common import Clock, Table, argument_parser, median_ratio, time_in_turns, use_one_core
from flax import nnx
from torch import nn
from torch.nn import functional

from minigpt4_jax.config import (
    ModelConfig,
    QFormerConfig,
    TokenizerConfig,
    VisionConfig,
    text_branch,
)
from minigpt4_jax.errors import run
from minigpt4_jax.models.minigpt import Batch
from minigpt4_jax.models.stage1 import Stage1
from minigpt4_jax.training.optimizer import adamw
from minigpt4_jax.training.train_step import make_step, split_model, trained_parts

QUERIES, TEXT, VOCAB, ITC, IMAGE, PATCH = 32, 32, 30523, 256, 112, 14
COLUMNS = {"": (24, ""), "ours s": (9, ".3f"), "peer s": (9, ".3f"), "ratio": (8, ".2f")}


class Attention(nn.Module):
    """BERT's self-attention or cross-attention with its residual and norm."""

    def __init__(self, width: int, source: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(source, width), nn.Linear(source, width)
        self.norm = nn.LayerNorm(width, 1e-12)

    def split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, source, mask=None, prefix=None):
        k, v = self.split(self.k(source)), self.split(self.v(source))
        own = k, v
        if prefix is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(prefix, own, strict=True))
        y = functional.scaled_dot_product_attention(self.split(self.q(x)), k, v, attn_mask=mask)
        return self.norm(x + self.out(y.transpose(1, 2).flatten(2))), own


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width, 1e-12)

    def forward(self, x):
        return self.norm(x + self.down(functional.gelu(self.up(x))))


class Block(nn.Module):
    def __init__(self, width: int, vision: int, heads: int, cross: bool):
        super().__init__()
        self.attention = Attention(width, width, heads)
        self.cross = Attention(width, vision, heads) if cross else None
        self.query_mlp, self.text_mlp = Mlp(width), Mlp(width)

    def forward(self, x, vision, queries, mask=None, prefix=None):
        x, own = self.attention(x, x, mask, prefix)
        query, text = x[:, :queries], x[:, queries:]
        if queries:
            if self.cross is not None:
                query = self.cross(query, vision)[0]
            query = self.query_mlp(query)
        text = self.text_mlp(text) if text.shape[1] else text
        return torch.cat([query, text], 1), own


class Peer(nn.Module):
    """The Q-Former of stage 1 with its heads, on top of a frozen vision encoder."""

    def __init__(self, width: int, layers: int, vision: int):
        super().__init__()
        heads = width // 64
        self.patch = nn.Conv2d(3, vision, PATCH, PATCH)
        layer = nn.TransformerEncoderLayer(
            vision, vision // 64, 4 * vision, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.vit = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        for p in [*self.patch.parameters(), *self.vit.parameters()]:
            p.requires_grad_(False)
        self.ln_vision = nn.LayerNorm(vision)
        self.query = nn.Parameter(0.02 * torch.randn(1, QUERIES, width))
        self.words, self.places = nn.Embedding(VOCAB, width), nn.Embedding(512, width)
        self.norm = nn.LayerNorm(width, 1e-12)
        self.blocks = nn.ModuleList(Block(width, vision, heads, i % 2 == 0) for i in range(layers))
        self.image_head, self.text_head = nn.Linear(width, ITC), nn.Linear(width, ITC)
        self.match, self.dense = nn.Linear(width, 2), nn.Linear(width, width)
        self.lm_norm, self.lm_bias = nn.LayerNorm(width, 1e-12), nn.Parameter(torch.zeros(VOCAB))
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def run(self, x, vision, queries, mask=None, prefixes=None):
        cached = []
        x = self.norm(x)
        for i, block in enumerate(self.blocks):
            x, own = block(x, vision, queries, mask, None if prefixes is None else prefixes[i])
            cached.append(own)
        return x, cached

    def forward(self, pixels, tokens):
        b = len(tokens)
        with torch.no_grad():
            seen = self.vit(self.patch(pixels).flatten(2).transpose(1, 2))
        vision = self.ln_vision(seen)
        query, text = self.query.expand(b, -1, -1), self.words(tokens) + self.places.weight[:TEXT]
        queries, cached = self.run(query, vision, QUERIES)
        read, _ = self.run(text, None, 0)
        images = functional.normalize(self.image_head(queries), dim=-1)
        texts = functional.normalize(self.text_head(read[:, 0]), dim=-1)
        i2t = torch.einsum("ipe,te->itp", images, texts.detach()).amax(2) / self.temperature
        t2i = torch.einsum("ipe,te->tip", images.detach(), texts).amax(2) / self.temperature
        target = torch.arange(b)
        itc = sum(functional.cross_entropy(s, target, label_smoothing=0.1) for s in (i2t, t2i)) / 2
        with torch.no_grad():
            eye = torch.eye(b, dtype=torch.bool)
            weights = [s.masked_fill(eye, -10000).softmax(1) for s in (t2i, i2t)]
            image_for_text, text_for_image = (torch.multinomial(w, 1)[:, 0] for w in weights)
        rows = torch.cat([vision, vision[image_for_text], vision])
        both = torch.cat([query.repeat(3, 1, 1), torch.cat([text, text, text[text_for_image]])], 1)
        logits = self.match(self.run(both, rows, QUERIES)[0][:, :QUERIES]).mean(1)
        itm = functional.cross_entropy(logits, (torch.arange(3 * b) < b).long())
        causal = torch.ones(TEXT, TEXT, dtype=torch.bool).tril()
        mask = torch.cat([torch.ones(TEXT, QUERIES, dtype=torch.bool), causal], 1)
        written, _ = self.run(text, None, 0, mask, cached)
        hidden = self.lm_norm(functional.gelu(self.dense(written[:, :-1])))
        scores = functional.linear(hidden, self.words.weight, self.lm_bias)
        lm = functional.cross_entropy(
            scores.flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=0.1
        )
        return itc + itm + lm


def our_step(width: int, layers: int, vision: int, batch: Batch):
    """A function that takes a training step of the same sizes here."""
    q = QFormerConfig(
        queries=QUERIES, hidden=width, layers=layers, heads=width // 64, ffn=4 * width,
        vision_width=vision, dropout=0.0, vocab=VOCAB, max_positions=512, itc_width=ITC, lm_head=True,
    )  # fmt: skip
    v = VisionConfig(IMAGE, PATCH, vision, 4, vision // 64, 4 * vision)
    config = ModelConfig(
        variant="blip2-qformer", vision=v, qformer=q, llm=text_branch(q), image_first=True,
        tokenizer=TokenizerConfig("bert", VOCAB - 1, 102, 0),
    )  # fmt: skip
    parts = trained_parts(freeze_vit=True, freeze_qformer=False, config=config)
    split = split_model(Stage1(config, nnx.Rngs(0)), parts, np.float32)
    tx = adamw(split.decay_mask)
    step = make_step(split, tx, None, dropout_seed=0, dropout_in={"qformer"})
    state = [split.trainable, jax.jit(tx.init)(split.trainable)]

    def take_step() -> None:
        *state[:], metrics = step(*state, split.frozen, batch, np.float32(1e-4), np.int32(0))
        jax.block_until_ready(metrics)

    return take_step


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vision", type=int, default=256)
    parser.add_argument("--one-core", action="store_true")
    args = parser.parse_args()
    clock: Clock = time.perf_counter
    if args.one_core:
        clock = use_one_core()
        torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((args.batch, 1, IMAGE, IMAGE, 3), np.float32)
    tokens = rng.integers(1000, VOCAB - 1, (args.batch, TEXT)).astype(np.int32)
    labels = np.tile(np.arange(1, TEXT, dtype=np.int32), (args.batch, 1))
    lengths = np.full(args.batch, TEXT, np.int32)
    ours = our_step(args.width, args.layers, args.vision, Batch(pixels, tokens, lengths, labels))

    peer = Peer(args.width, args.layers, args.vision)
    optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], 1e-4)
    images, ids = (
        torch.from_numpy(pixels[:, 0]).permute(0, 3, 1, 2),
        torch.from_numpy(tokens).long(),
    )

    def theirs() -> None:
        optimizer.zero_grad(set_to_none=True)
        peer(images, ids).backward()
        optimizer.step()

    times = time_in_turns(args.rounds, {"ours": ours, "peer": theirs}, clock=clock)
    medians = [float(np.median(times[side])) for side in ("ours", "peer")]
    table = Table(COLUMNS)
    table.row(f"step, batch {args.batch}", *medians, median_ratio(times["ours"], times["peer"]))


if __name__ == "__main__":
    run(main)
