"""Memory of decoding at full size, from the compiled program; no weights are made.

    python benchmarks/decode_memory.py [--model=7b,13b] [--precision=bfloat16,int8,int4]
                                       [--batch=1] [--context=2000] [--layers=N]

lowers the decoding loop over parameters that are shapes only, compiles it for this machine's
backend, and prints bytes by `memory_analysis`: arguments (all weights, visual encoder and Q-Former
included, and the cache in bfloat16) and temporaries. XLA on CPU converts
the matrices of all layers at the start of each step (inside the loop, not before it) and keeps the
copies until each is used, and copies caches to float32: 0.47 GB a layer at 7B in int8. So the
temporaries here say nothing about a GPU. --layers compiles a language model of fewer layers, and
adds the arguments of the others; 0 compiles nothing.
"""

import argparse
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax import weights
from minigpt4_jax.config import LlmConfig, ModelConfig
from minigpt4_jax.errors import Parser, UserError, run
from minigpt4_jax.models.cache import KVCache

MODELS = {
    "7b": ModelConfig(),
    "13b": ModelConfig(llm=LlmConfig(width=5120, layers=40, heads=40, kv_heads=40, ffn=13824)),
}
PRECISIONS = {"bfloat16": None, "int8": "int8", "int4": "int4"}
TARGETS = {("7b", "int8"): 9.0, ("13b", "int8"): 15.5, ("7b", "int4"): 5.5, ("13b", "int4"): 9.0}


def parameters(config: ModelConfig) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """(graph, leaves) of the model for decoding, as `load` in bfloat16 makes it."""
    graphdef, state = nnx.split(weights.abstract_model(config, stacked=False))
    flat = []
    for path, leaf in nnx.to_flat_state(state):
        integer = jnp.issubdtype(leaf.dtype, jnp.integer)
        kind = leaf.dtype if integer else weights.parameter_dtype(path, jnp.dtype(jnp.bfloat16))
        flat.append((path, leaf.replace(jax.ShapeDtypeStruct(leaf.shape, kind))))
    whole = nnx.from_flat_state(flat)
    return (graphdef, jax.tree.structure(whole)), jax.tree.leaves(whole)


def cache_shapes(c: LlmConfig, batch: int, context: int) -> KVCache:
    one = jax.ShapeDtypeStruct((batch, c.kv_heads, context, c.head_dim), jnp.bfloat16)
    return KVCache([one] * c.layers, [one] * c.layers)


def size(tree: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def temporaries(config: ModelConfig, batch: int, context: int) -> int:
    """Bytes that the compiled loop needs beside its arguments; its cache is donated."""
    (graphdef, treedef), leaves = parameters(config)

    def decode(leaves: list, cache: KVCache, token: jax.Array, position: jax.Array) -> Any:
        llm = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves)).llm

        def step(carry: tuple) -> tuple:
            token, position, cache = carry
            embeds = llm.embed_tokens(token[:, None])
            hidden, cache = llm.decode(embeds, position[:, None], cache)
            token = jnp.argmax(llm.logits(hidden[:, 0]), -1).astype(jnp.int32)
            return token, position + 1, cache

        return jax.lax.while_loop(lambda c: c[1][0] < context, step, (token, position, cache))

    cache = cache_shapes(config.llm, batch, context)
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    compiled = jax.jit(decode, donate_argnums=1, keep_unused=True).lower(leaves, cache, row, row)
    found = compiled.compile().memory_analysis()
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    return found.temp_size_in_bytes + max(outputs, 0)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="7b,13b")
    parser.add_argument("--precision", default="bfloat16,int8,int4")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--layers", type=int, help="0: arguments alone, nothing is compiled")
    a = parser.parse_args()
    names, precisions = a.model.split(","), a.precision.split(",")
    if unknown := [n for n in names if n not in MODELS] + [
        p for p in precisions if p not in PRECISIONS
    ]:
        raise UserError(f"{unknown[0]!r}: expected {', '.join(MODELS)}; {', '.join(PRECISIONS)}")
    print(f"GB on {jax.default_backend()}, context {a.context}")
    columns = ("weights", "cache", "temporary", "total", "target")
    print(f"{'model':6}{'precision':10}{'batch':>6}" + "".join(f"{c:>11}" for c in columns))
    for name in names:
        for precision in precisions:
            for batch in map(int, a.batch.split(",")):
                config = dataclasses.replace(MODELS[name], quantize=PRECISIONS[precision])
                values = [
                    size(parameters(config)[1]), size(cache_shapes(config.llm, batch, a.context))
                ]  # fmt: skip
                if a.layers != 0:
                    layers = min(a.layers or config.llm.layers, config.llm.layers)
                    llm = dataclasses.replace(config.llm, layers=layers)
                    cut = dataclasses.replace(config, llm=llm)
                    values.append(temporaries(cut, batch, a.context))
                else:
                    values.append(0)
                numbers = "".join(f"{v / 1e9:11.3f}" for v in [*values, sum(values)])
                target = TARGETS.get((name, precision), "") if batch == 1 else ""
                print(f"{name:6}{precision:10}{batch:6}{numbers}{target:>11}", flush=True)


if __name__ == "__main__":
    run(main)
