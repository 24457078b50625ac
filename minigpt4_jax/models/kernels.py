"""Causal attention by a kernel, for TPUs: scores stay on the chip, and blocks that nothing of is seen
are left out (FlashAttention-2 paper; JAX's splash attention kernel)."""

import math

import jax
import jax.numpy as jnp

from minigpt4_jax.sharding import ROWS, split_over

BLOCK = 512  # queries, and keys, that a chip works on at once


def takes(q: jax.Array) -> bool:
    """Whether the kernel is for queries [B, T, N, H] like these."""
    return q.dtype == jnp.bfloat16 and q.shape[-1] % 128 == 0


def causal_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, *, interpret: bool = False
) -> jax.Array:
    """q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H], softmax in float32. Rows are padded on the
    right, so that no token sees padding, and what comes of padding itself is of no use.

    interpret: the kernel as ordinary operations, for machines without a TPU.
    """
    b, t, n, _ = q.shape
    full = -(-t // BLOCK) * BLOCK
    pads = ((0, 0), (0, full - t), (0, 0), (0, 0))
    heads_first = [jnp.pad(a, pads).transpose(0, 2, 1, 3) for a in (q * scale, k, v)]

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:  # [B, heads, T, H] each
        return jax.vmap(_kernel(q.shape[1], full, interpret))(q, k, v)

    # of heads as many as divide both: a group of queries stays with its keys
    heads = math.gcd(n, k.shape[2])
    run = split_over(
        local,
        (b, heads),
        (ROWS, "model"),
        ((0, 1, None, None),) * 3,
        (0, 1, None, None),
        kernel=True,
    )
    return run(*heads_first).transpose(0, 2, 1, 3)[:, :t]


def _kernel(heads: int, tokens: int, interpret: bool) -> jax.custom_vjp:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    sizes = splash.BlockSizes(
        block_q=BLOCK, block_kv=BLOCK, block_q_dkv=BLOCK, block_kv_dkv=BLOCK,
        block_q_dq=BLOCK, block_kv_dq=BLOCK,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((tokens, tokens)) for _ in range(heads)])
    return splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
