"""An independent float64 NumPy implementation of the model, written from the papers.

Tensors map the names of a model directory to arrays; no batch axis, no cache, no padding.
"""

import math

import numpy as np

IMAGE = -1


def f64(x):
    return np.asarray(x).astype(np.float64)


def linear(t, name, x):
    y = x @ f64(t[name + ".weight"]).T
    return y + f64(t[name + ".bias"]) if name + ".bias" in t else y


def layer_norm(t, name, x, eps):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * f64(t[name + ".scale"]) + f64(t[name + ".bias"])


def rms_norm(t, name, x, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * f64(t[name + ".scale"])


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def silu(x):
    return x / (1 + np.exp(-x))


def attention(q, k, v, heads, mask=None):
    """q [T, N H], k and v [S, K H] -> [T, N H]; mask [T, S]."""
    t, s, h = q.shape[0], k.shape[0], q.shape[1] // heads
    group = heads // (k.shape[1] // h)
    q = q.reshape(t, heads, h).transpose(1, 0, 2)
    k = k.reshape(s, -1, h).transpose(1, 2, 0).repeat(group, 0)
    v = v.reshape(s, -1, h).transpose(1, 0, 2).repeat(group, 0)
    scores = q @ k / math.sqrt(h)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(t, -1)


def vit_block(t, b, x, c):
    y = layer_norm(t, b + "norm1", x, c.eps)
    bias = [f64(t[b + "attn.q_bias"]), np.zeros(c.width), f64(t[b + "attn.v_bias"])]
    q, k, v = np.split(linear(t, b + "attn.qkv", y) + np.concatenate(bias), 3, axis=1)
    x = x + linear(t, b + "attn.out", attention(q, k, v, c.heads))
    y = layer_norm(t, b + "norm2", x, c.eps)
    return x + linear(t, b + "mlp.down", gelu(linear(t, b + "mlp.up", y)))


def patches(pixels, p):
    """[S, S, 3] -> [N, 3 p p] in the order of a convolution's weights."""
    g = pixels.shape[0] // p
    x = f64(pixels).reshape(g, p, g, p, 3).transpose(0, 2, 4, 1, 3)
    return x.reshape(g * g, -1)


def vit(t, c, pixels, keep=None):
    x = linear(t, "vit.patch", patches(pixels, c.patch_size))
    x = np.concatenate([f64(t["vit.cls"])[None], x]) + f64(t["vit.pos"])
    for i in range(c.depth):
        x = vit_block(t, f"vit.blocks.{i}.", x, c)
        if keep is not None:
            keep.append(x)
    return x


def post_norm_attention(t, b, x, source, c):
    q, k, v = linear(t, b + "q", x), linear(t, b + "k", source), linear(t, b + "v", source)
    y = linear(t, b + "out", attention(q, k, v, c.heads))
    return layer_norm(t, b + "norm", x + y, c.eps)


def qformer_layer(t, b, x, vision, c, cross):
    x = post_norm_attention(t, b + "attn.", x, x, c)
    if cross:
        x = post_norm_attention(t, b + "cross.", x, vision, c)
    y = linear(t, b + "mlp.down", gelu(linear(t, b + "mlp.up", x)))
    return layer_norm(t, b + "mlp.norm", x + y, c.eps)


def qformer(t, c, vision, keep=None):
    x = layer_norm(t, "qformer.norm", f64(t["qformer.query"]), c.eps)
    for i in range(c.layers):
        x = qformer_layer(t, f"qformer.blocks.{i}.", x, vision, c, i % c.cross_every == 0)
        if keep is not None:
            keep.append(x)
    return x


def encode(t, config, pixels):
    """Pixels [S, S, 3] -> projected visual tokens [P, D]."""
    x = layer_norm(t, "ln_vision", vit(t, config.vision, pixels), 1e-5)
    if config.qformer is None:
        x = x[1:].reshape(config.visual_tokens, -1)
    else:
        x = qformer(t, config.qformer, x)
    return linear(t, "projection", x)


def rotate(x, heads, theta, frequencies=None):
    t, h = x.shape[0], x.shape[1] // heads
    if frequencies is None:
        frequencies = theta ** (-np.arange(0, h, 2) / h)
    angle = np.arange(t)[:, None, None] * frequencies
    x = x.reshape(t, heads, h)
    a, b = x[..., : h // 2], x[..., h // 2 :]
    rotated = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    return np.concatenate(rotated, -1).reshape(t, -1)


def llm_linear(t, name, x, lora):
    y = linear(t, name, x)
    if name + ".lora_a" in t:
        low = x @ f64(t[name + ".lora_a"]).T @ f64(t[name + ".lora_b"]).T
        y = y + lora.alpha / lora.rank * low
    return y


def llm_block(t, b, x, c, lora=None):
    y = rms_norm(t, b + "norm1", x, c.eps)
    q, k, v = (llm_linear(t, b + "attn." + n, y, lora) for n in "qkv")
    q, k = rotate(q, c.heads, c.rope_theta), rotate(k, c.kv_heads, c.rope_theta)
    mask = np.tri(len(x), dtype=bool)
    x = x + linear(t, b + "attn.o", attention(q, k, v, c.heads, mask))
    y = rms_norm(t, b + "norm2", x, c.eps)
    gate, up = linear(t, b + "mlp.gate", y), linear(t, b + "mlp.up", y)
    return x + linear(t, b + "mlp.down", silu(gate) * up)


def logits(t, config, tokens, visual=None):
    """tokens [T] with IMAGE at visual tokens, visual [I P, D] -> scores [T, V]."""
    c = config.llm
    tokens = np.asarray(tokens)
    x = f64(t["llm.embed"])[np.maximum(tokens, 0)]
    if visual is not None:
        x[tokens == IMAGE] = visual
    for i in range(c.layers):
        x = llm_block(t, f"llm.blocks.{i}.", x, c, config.lora)
    x = rms_norm(t, "llm.norm", x, c.eps)
    return x @ f64(t["llm.embed" if c.tie else "llm.head.weight"]).T


def nll(t, config, tokens, answers, visual=None):
    """Summed negative log-likelihood of tokens[answers]."""
    scores = logits(t, config, tokens, visual)
    top = scores.max(-1, keepdims=True)
    logp = scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))
    return -sum(logp[a - 1, tokens[a]] for a in answers)


def greedy(t, config, tokens, count, visual=None):
    """`count` greedily decoded ids, each from a full forward pass."""
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(logits(t, config, tokens, visual)[-1].argmax()))
    return tokens[-count:]
