"""A training step of BLIP-2's first stage beside the original's way, written plainly in PyTorch.

    python benchmarks/blip2_stage1.py [--rounds=5] [--batch=8] [--layers=4] [--width=256] [--vision=256]
        [--dropout=0.1] [--one-core]

Both sides: a frozen vision encoder of 4 layers (images of 112 px), a Q-Former with 32 queries and text of
32 tokens, the three losses, backward pass and AdamW in float32; random weights and data of equal sizes.
The peer does what LAVIS' Qformer.py and blip2_qformer.py do: attention as products, softmax and dropout
with masks that are added; keys and values of the image for every row of every pass; scores of the words
at all positions; the captioning pass reads the cached keys and values of the queries. Prints seconds and
their ratio; with --one-core CPU seconds of one core, for a busy machine.
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

    def __init__(self, width: int, source: int, heads: int, rate: float):
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(source, width), nn.Linear(source, width)
        self.norm, self.dropout = nn.LayerNorm(width, 1e-12), nn.Dropout(rate)

    def split(self, x):
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, source, mask, prefix=None):
        q, k, v = self.split(self.q(x)), self.split(self.k(source)), self.split(self.v(source))
        if prefix is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(prefix, (k, v), strict=True))
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + mask
        y = self.dropout(scores.softmax(3)) @ v
        y = self.dropout(self.out(y.transpose(1, 2).flatten(2)))
        return self.norm(x + y), (k, v)


class Mlp(nn.Module):
    def __init__(self, width: int, rate: float):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm, self.dropout = nn.LayerNorm(width, 1e-12), nn.Dropout(rate)

    def forward(self, x):
        return self.norm(x + self.dropout(self.down(functional.gelu(self.up(x)))))


class Block(nn.Module):
    def __init__(self, width: int, vision: int, heads: int, cross: bool, rate: float):
        super().__init__()
        self.attention = Attention(width, width, heads, rate)
        self.cross = Attention(width, vision, heads, rate) if cross else None
        self.query_mlp, self.text_mlp = Mlp(width, rate), Mlp(width, rate)

    def forward(self, x, mask, vision, vision_mask, queries, prefix):
        x, own = self.attention(x, x, mask, prefix)
        if not queries:
            return self.text_mlp(x), own
        query, text = x[:, :queries], x[:, queries:]
        if self.cross is not None:
            query = self.cross(query, vision, vision_mask)[0]
        query = self.query_mlp(query)
        if text.shape[1]:
            query = torch.cat([query, self.text_mlp(text)], 1)
        return query, own


class VisionBlock(nn.Module):
    """EVA's layer."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = width // 64
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, 1e-6), nn.LayerNorm(width, 1e-6)

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = (q * q.shape[3] ** -0.5 @ k.transpose(2, 3)).softmax(3) @ v
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


def added_mask(visible):
    """Which keys are seen, [B, keys] or [B, T, keys] -> what is added to scores [B, N, T, keys]."""
    visible = visible[:, None, None] if visible.dim() == 2 else visible[:, None]
    return (1.0 - visible.float()) * -10000.0


class Peer(nn.Module):
    """The Q-Former of stage 1 with its heads, on top of a frozen vision encoder."""

    def __init__(self, width: int, layers: int, vision: int, rate: float):
        super().__init__()
        heads = width // 64
        self.patch = nn.Conv2d(3, vision, PATCH, PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, vision))
        self.pos = nn.Parameter(torch.randn(1, 1 + (IMAGE // PATCH) ** 2, vision))
        self.vit = nn.Sequential(*(VisionBlock(vision) for _ in range(4)))
        for p in self.parameters():
            p.requires_grad_(False)
        self.ln_vision = nn.LayerNorm(vision)
        self.query = nn.Parameter(0.02 * torch.randn(1, QUERIES, width))
        self.words, self.places = nn.Embedding(VOCAB, width), nn.Embedding(512, width)
        self.norm, self.dropout = nn.LayerNorm(width, 1e-12), nn.Dropout(rate)
        self.blocks = nn.ModuleList(
            Block(width, vision, heads, i % 2 == 0, rate) for i in range(layers)
        )
        self.image_head, self.text_head = nn.Linear(width, ITC), nn.Linear(width, ITC)
        self.match, self.dense = nn.Linear(width, 2), nn.Linear(width, width)
        self.lm_norm, self.lm_bias = nn.LayerNorm(width, 1e-12), nn.Parameter(torch.zeros(VOCAB))
        self.temperature = nn.Parameter(torch.tensor(0.07))

    def run(self, tokens=None, queries=None, visible=None, vision=None, prefixes=None):
        """The Q-Former: text, queries or both -> [B, P + T, D], and keys and values of each layer."""
        parts = [] if queries is None else [queries]
        if tokens is not None:
            parts.append(self.words(tokens) + self.places.weight[:TEXT])
        x = self.dropout(self.norm(torch.cat(parts, 1)))
        p = 0 if queries is None else queries.shape[1]
        mask = added_mask(x.new_ones(x.shape[:2]) if visible is None else visible)
        of_vision = None if vision is None else added_mask(vision.new_ones(vision.shape[:2]))
        cached = []
        for block, prefix in zip(self.blocks, prefixes or [None] * len(self.blocks), strict=True):
            x, own = block(x, mask, vision, of_vision, p, prefix)
            cached.append(own)
        return x, cached

    def forward(self, pixels, tokens, attended):
        """pixels [B, 3, S, S], tokens [B, T], attended [B, T]: 0 at padding."""
        b = len(tokens)
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(b, -1, -1), x], 1) + self.pos
        vision = self.ln_vision(self.vit(x))
        query = self.query.expand(b, -1, -1)
        queries, cached = self.run(queries=query, vision=vision)
        read, _ = self.run(tokens, visible=attended)
        images = functional.normalize(self.image_head(queries), dim=-1)
        texts = functional.normalize(self.text_head(read[:, 0]), dim=-1)
        i2t = (images[:, None] @ texts.detach()[..., None])[..., 0].amax(2) / self.temperature
        t2i = (texts[:, None, None] @ images.detach().transpose(1, 2))[:, :, 0].amax(2)
        t2i = t2i / self.temperature
        target = torch.arange(b)
        itc = sum(functional.cross_entropy(s, target, label_smoothing=0.1) for s in (i2t, t2i)) / 2

        with torch.no_grad():
            weights = [s.clone().fill_diagonal_(-10000).softmax(1) for s in (t2i, i2t)]
            image_for_text, text_for_image = (
                torch.cat([torch.multinomial(row, 1) for row in rows]) for rows in weights
            )
        rows = torch.cat([vision, vision[image_for_text], vision])
        ids, seen = (torch.cat([a, a, a[text_for_image]]) for a in (tokens, attended))
        every_query = self.query.expand(3 * b, -1, -1)
        seen = torch.cat([seen.new_ones(3 * b, QUERIES), seen], 1)
        both, _ = self.run(ids, every_query, seen, rows)
        logits = self.match(both[:, :QUERIES]).mean(1)
        itm = functional.cross_entropy(logits, (torch.arange(3 * b) < b).long())

        caption = tokens.clone()
        caption[:, 0] = VOCAB - 1
        causal = torch.ones(TEXT, TEXT).tril() * attended[:, None]
        visible = torch.cat([causal.new_ones(b, TEXT, QUERIES), causal], 2)
        written, _ = self.run(caption, visible=visible, prefixes=cached)
        hidden = self.lm_norm(functional.gelu(self.dense(written)))
        scores = functional.linear(hidden, self.words.weight, self.lm_bias)[:, :-1].contiguous()
        labels = caption.masked_fill(attended == 0, -100)[:, 1:]
        lm = functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        return itc + itm + lm


def our_step(width: int, layers: int, vision: int, rate: float, batch: Batch):
    """A function that takes a training step of the same sizes here."""
    q = QFormerConfig(
        queries=QUERIES, hidden=width, layers=layers, heads=width // 64, ffn=4 * width,
        vision_width=vision, dropout=rate, vocab=VOCAB, max_positions=512, itc_width=ITC, lm_head=True,
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
    parser.add_argument("--dropout", type=float, default=0.1, help="that of the recipe")
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
    sizes = args.width, args.layers, args.vision, args.dropout
    ours = our_step(*sizes, Batch(pixels, tokens, lengths, labels))

    peer = Peer(*sizes)
    trained = [p for p in peer.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, 1e-4)
    images = torch.from_numpy(pixels[:, 0]).permute(0, 3, 1, 2).contiguous()
    ids = torch.from_numpy(tokens).long()

    def theirs() -> None:
        peer(images, ids, torch.ones_like(ids)).backward()
        optimizer.step()
        optimizer.zero_grad()

    times = time_in_turns(args.rounds, {"ours": ours, "peer": theirs}, clock=clock)
    medians = [float(np.median(times[side])) for side in ("ours", "peer")]
    table = Table(COLUMNS)
    table.row(f"step, batch {args.batch}", *medians, median_ratio(times["ours"], times["peer"]))


if __name__ == "__main__":
    run(main)
