"""Attention: plain, causal in query chunks, over a key-value cache, and by kernels of TPUs and GPUs.

Axes: B batch, T queries, S keys, N query heads, K key/value heads, H head dim. The kernels are JAX's splash
attention and cuDNN's: scores stay on the chip, and fully masked blocks are skipped (FlashAttention-2 paper).
"""

import math
import os
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.parallel.sharding import BATCH_AXES, shard_map_over
from minigpt4_jax.quantization.matmul import precision
from minigpt4_jax.utils.platform import backend, compute_capability
from minigpt4_jax.utils.rounding import round_up

CHUNKED_FROM = 1024  # longer prompts are processed in chunks
QUERY_CHUNK = 256  # queries per chunk
CUDNN_VARIABLE = "MINIGPT4_JAX_CUDNN"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    causal: bool = False,
    lengths: jax.Array | None = None,
    mask: jax.Array | None = None,
    segments: jax.Array | None = None,
    window: int | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """q [B, T, N, H], k and v [B, S, K, H] -> [B, T, N, H]; softmax in float32.

    lengths [B]: keys at and after a row's length are masked. mask [B, 1, T, S]: True is attended to.
    segments [B, T = S] replaces both: a query attends to the keys of its own segment. window: with
    causal, a query attends to itself and the window - 1 keys before it. bias [1, N, T, S]: added to
    the scores.
    """
    if q.dtype == jnp.bfloat16 and _lacks_bfloat16():
        y = attention(
            *(a.astype(jnp.float32) for a in (q, k, v)), scale=scale, causal=causal, lengths=lengths,
            mask=mask, segments=segments, window=window, bias=bias,
        )  # fmt: skip
        return y.astype(q.dtype)
    plain = segments is None and mask is None and bias is None
    if plain and cudnn_supports(q):
        return cudnn_attention(q, k, v, scale, causal=causal, lengths=lengths, window=window)
    if causal and plain and q.shape[1] > CHUNKED_FROM:
        if backend() == "tpu" and window is None and splash_supports(q):
            return splash_attention(q, k, v, scale)
        return _chunked_attention(q, k, v, scale, lengths, window)
    if segments is not None:
        mask, lengths = segments[:, None, :, None] == segments[:, None, None, :], None
    with jax.default_matmul_precision("highest" if q.dtype == jnp.float32 else "default"):
        return jax.nn.dot_product_attention(
            q, k, v, bias=bias, mask=mask, scale=scale, is_causal=causal,
            key_value_seq_lengths=lengths,
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip


def _chunked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    lengths: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Causal `attention` in query chunks: all scores [B, N, T, S] at once would be by far the largest
    array of a long prefill."""
    b, t, n, h = q.shape
    padded = round_up(t, QUERY_CHUNK)
    q = jnp.pad(q, ((0, 0), (0, padded - t), (0, 0), (0, 0)))
    chunks = jnp.moveaxis(q.reshape(b, -1, QUERY_CHUNK, n, h), 1, 0)
    keys = jnp.arange(k.shape[1])

    def attend(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        q, start = chunk
        positions = start + jnp.arange(QUERY_CHUNK)[:, None]
        mask = keys <= positions
        if window is not None:
            mask &= keys > positions - window
        return attention(q, k, v, scale=scale, lengths=lengths, mask=mask[None, None])

    y = jax.lax.map(attend, (chunks, jnp.arange(padded // QUERY_CHUNK) * QUERY_CHUNK))
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, n, h)[:, :t]


def cached_attention(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Attention to a cache: q [B, T, N, H], keys and values [B, K, S, H], mask [B, T, S] (True is
    attended to) -> [B, T, N, H]. The cache is used in its own layout, heads first, without a transpose.
    bias [B, N, T, S]: added to the scores.

    key_scale, value_scale [B, K, S]: scales of a quantized cache, applied to scores and probabilities.
    """
    b, t, n, h = q.shape
    k, s = keys.shape[1:3]
    exact = precision(keys.dtype)
    q = q.astype(keys.dtype).reshape(b, t, k, n // k, h).transpose(0, 2, 1, 3, 4)
    scores = jnp.einsum(
        "bkqh,bksh->bkqs", q.reshape(b, k, -1, h), keys, precision=exact,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    if key_scale is not None:
        scores *= key_scale[:, :, None, :]
    scores = (scores * scale).reshape(b, k, t, n // k, s)
    if bias is not None:
        scores += bias.reshape(-1, k, n // k, t, s).swapaxes(2, 3)
    scores = jnp.where(mask[:, None, :, None, :], scores, np.finfo(np.float32).min)
    probs = jax.nn.softmax(scores, axis=-1).reshape(b, k, -1, s)
    if value_scale is not None:
        probs *= value_scale[:, :, None, :]
    y = jnp.einsum(
        "bkqs,bksh->bkqh", probs.astype(values.dtype), values, precision=exact,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    return y.reshape(b, k, t, n // k, h).transpose(0, 2, 1, 3, 4).reshape(b, t, n, h)


def _lacks_bfloat16() -> bool:
    """Whether programs are traced for an NVIDIA GPU before Ampere: XLA has no bfloat16 product with the
    float32 sums that JAX's attention asks for there."""
    return backend() == "gpu" and (0, 0) < compute_capability() < (8, 0)


def cudnn_supports(q: jax.Array) -> bool:
    """Whether programs are traced for a GPU whose cuDNN attends to queries [B, T, N, H] like these: in
    bfloat16, from compute capability 8.0 (Ampere) on. The environment variable MINIGPT4_JAX_CUDNN=0 turns
    cuDNN off."""
    return (
        backend() == "gpu"
        and os.environ.get(CUDNN_VARIABLE, "") != "0"
        and q.dtype == jnp.bfloat16
        and q.shape[-1] <= 128
        and q.shape[-1] % 8 == 0
        and compute_capability() >= (8, 0)
    )


def cudnn_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scale: float,
    *,
    causal: bool,
    lengths: jax.Array | None,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """`attention` without mask, segments and bias, by cuDNN. implementation: "xla" for a machine without."""
    b, _, n, _ = q.shape
    lengths = None if lengths is None else jnp.maximum(lengths, 1)  # a softmax over no key is NaN

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *lengths: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=causal, implementation=implementation,
            key_value_seq_lengths=lengths[0] if lengths else None,
            local_window_size=None if window is None else (window - 1, 0),
        )  # fmt: skip

    # Split by a number of heads that divides both, so that query groups stay with their keys.
    heads = math.gcd(n, k.shape[2])
    rows = [] if lengths is None else [lengths]
    dims = [(0, None, 1, None)] * 3 + [(0,)] * len(rows)
    run = shard_map_over(
        local, (b, heads), (BATCH_AXES, "model"), dims, (0, None, 1, None), pallas=True
    )
    return run(q, k, v, *rows)


SPLASH_BLOCK = 512  # queries, and keys, per block of the kernel


def splash_supports(q: jax.Array) -> bool:
    """Whether the kernel supports these queries [B, T, N, H]."""
    return q.dtype == jnp.bfloat16 and q.shape[-1] % 128 == 0


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, *, interpret: bool = False
) -> jax.Array:
    """Causal attention by JAX's splash attention kernel: q [B, T, N, H], k and v [B, T, K, H]
    -> [B, T, N, H], softmax in float32.

    Rows are padded on the right, so no token attends to padding; outputs at padding are not used.
    interpret: run the kernel as ordinary operations, on machines without a TPU.
    """
    b, t, n, _ = q.shape
    padded = round_up(t, SPLASH_BLOCK)
    pads = ((0, 0), (0, padded - t), (0, 0), (0, 0))
    heads_first = [jnp.pad(a, pads).transpose(0, 2, 1, 3) for a in (q * scale, k, v)]

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:  # [B, heads, T, H] each
        output: jax.Array = jax.vmap(_kernel(q.shape[1], padded, interpret))(q, k, v)
        return output

    # Split by a number of heads that divides both, so that query groups stay with their keys.
    heads = math.gcd(n, k.shape[2])
    run = shard_map_over(
        local,
        (b, heads),
        (BATCH_AXES, "model"),
        ((0, 1, None, None),) * 3,
        (0, 1, None, None),
        pallas=True,
    )
    return run(*heads_first).transpose(0, 2, 1, 3)[:, :t]


def _kernel(heads: int, tokens: int, interpret: bool) -> Any:
    """The causal kernel for arrays [heads, tokens, H]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = splash.BlockSizes(
        block_q=SPLASH_BLOCK, block_kv=SPLASH_BLOCK, block_q_dkv=SPLASH_BLOCK, block_kv_dkv=SPLASH_BLOCK,
        block_q_dq=SPLASH_BLOCK, block_kv_dq=SPLASH_BLOCK,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((tokens, tokens)) for _ in range(heads)])
    return splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
