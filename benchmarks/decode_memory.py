"""Memory of answering at full size, from the compiled programs; no weights are made.

    python benchmarks/decode_memory.py [--model=7b,13b,v2] [--precision=bfloat16,int8,int4]
        [--batch=1,8,32] [--context=2000] [--topology=v5p:1x1x1] [--layers=N] [--decode-layers=N]

lowers three programs over parameters that are shapes only: the vision encoder on one image, the
prefill of a row of `context` tokens, and the decoding loop over `batch` rows; compiles them for a
chip of the topology (libtpu makes programs for TPUs without one), and prints bytes by
`memory_analysis`. The weights, visual encoder and Q-Former included, stay through all three, and
the cache (in int8 where the weights are rounded, else in bfloat16) is there from the prefill on; a
program's temporaries come on top. peak is the largest sum. --topology=none compiles for this machine
instead: XLA on CPU converts matrices and caches to float32, so its temporaries say nothing about
an accelerator.
--layers compiles the prefill of a language model cut to so many layers, which is much faster: a
layer's temporaries make room for the next one's. --decode-layers does so with the decoding loop.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from minigpt4_jax import topology, weights
from minigpt4_jax.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig
from minigpt4_jax.errors import Parser, UserError, run
from minigpt4_jax.models.cache import KVCache, Rounded

MODELS = {
    "7b": ModelConfig(),
    "13b": ModelConfig(llm=LlmConfig(width=5120, layers=40, heads=40, kv_heads=40, ffn=13824)),
    "v2": ModelConfig(
        variant="minigpt-v2",
        vision=VisionConfig(image_size=448),
        qformer=None,
        merge_patches=4,
        lora=LoraConfig(),
    ),
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


def cache_shapes(config: ModelConfig, batch: int, context: int) -> KVCache:
    """Of a quantized model in int8, a scale for each vector; else in bfloat16."""
    c = config.llm
    shape = (batch, c.kv_heads, context, c.head_dim)
    one: Any = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    if config.quantize is not None:
        scale = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
        one = Rounded(jax.ShapeDtypeStruct(shape, jnp.int8), scale)
    return KVCache([one] * c.layers, [one] * c.layers)


def size(tree: Any) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


class Programs:
    """What answering compiles, for one model and device."""

    def __init__(self, config: ModelConfig, device: Any):
        self.config, self.device = config, device
        (self.graphdef, self.treedef), leaves = parameters(config)
        self.leaves = [self._placed(leaf) for leaf in leaves]

    def _placed(self, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        place = SingleDeviceSharding(self.device)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def _model(self, leaves: list) -> Any:
        model = nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))
        model.llm.int8_cache = self.config.quantize is not None
        return model

    def compile(self, program: Callable, *inputs: Any, donate: tuple[int, ...] = ()) -> Any:
        inputs = jax.tree.map(self._placed, inputs)
        jitted = jax.jit(program, donate_argnums=donate, keep_unused=True)
        return jitted.lower(self.leaves, *inputs).compile()

    def encode(self) -> Any:
        s = self.config.vision.image_size
        pixels = jax.ShapeDtypeStruct((1, 1, s, s, 3), jnp.uint8)
        return self.compile(lambda leaves, p: self._model(leaves).encode(p), pixels)

    def prefill(self, context: int) -> Any:
        c = self.config

        def program(leaves: list, tokens: jax.Array, visual: jax.Array, lengths: jax.Array) -> Any:
            model = self._model(leaves)
            embeds = model.merge(tokens, visual)
            hidden, cache = model.llm.prefill(embeds, lengths, context)
            last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
            return jnp.argmax(model.llm.logits(last), -1), cache

        tokens = jax.ShapeDtypeStruct((1, context), jnp.int32)
        visual = jax.ShapeDtypeStruct((1, c.visual_tokens, c.llm.width), jnp.float32)
        return self.compile(program, tokens, visual, jax.ShapeDtypeStruct((1,), jnp.int32))

    def decode(self, batch: int, context: int) -> Any:
        def program(leaves: list, cache: KVCache, token: jax.Array, position: jax.Array) -> Any:
            llm = self._model(leaves).llm

            def step(carry: tuple) -> tuple:
                token, position, cache = carry
                embeds = llm.embed_tokens(token[:, None])
                hidden, cache = llm.decode(embeds, position[:, None], cache)
                token = jnp.argmax(llm.logits(hidden[:, 0]), -1).astype(jnp.int32)
                return token, position + 1, cache

            return jax.lax.while_loop(lambda c: c[1][0] < context, step, (token, position, cache))

        cache = cache_shapes(self.config, batch, context)
        row = jax.ShapeDtypeStruct((batch,), jnp.int32)
        return self.compile(program, cache, row, row, donate=(1,))


def temporaries(compiled: Any) -> int:
    """Bytes beside arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def cut(config: ModelConfig, layers: int | None) -> ModelConfig:
    """With so many layers of the language model."""
    llm = dataclasses.replace(config.llm, layers=layers or config.llm.layers)
    return dataclasses.replace(config, llm=llm)


def measure(
    config: ModelConfig, device: Any, batches: list[int], context: int, layers: int | None,
    decode_layers: int | None,
) -> Iterator[dict[str, float]]:  # fmt: skip
    """GB by column, for each batch."""
    held, row = size(parameters(config)[1]), size(cache_shapes(config, 1, context))
    with topology.compiling_for(device.platform):
        first = Programs(cut(config, layers), device)
        encode, prefill = temporaries(first.encode()), temporaries(first.prefill(context))
        loop = Programs(cut(config, decode_layers), device)
        for batch in batches:
            cache = size(cache_shapes(config, batch, context))
            decode = temporaries(loop.decode(batch, context))
            # other rows' caches lie beside a row while its image is encoded
            peak = max(encode + cache - row, cache + prefill, cache + decode)
            found = {
                "weights": held, "cache": cache, "encode": encode, "prefill": prefill,
                "decode": decode, "peak": held + peak,
            }  # fmt: skip
            yield {name: value / 1e9 for name, value in found.items()}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="7b,13b")
    parser.add_argument("--precision", default="bfloat16,int8,int4")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--topology", default="v5p:1x1x1")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--decode-layers", type=int)
    a = parser.parse_args()
    names, precisions = a.model.split(","), a.precision.split(",")
    batches = [int(batch) for batch in a.batch.split(",")]
    if unknown := [n for n in names if n not in MODELS] + [
        p for p in precisions if p not in PRECISIONS
    ]:
        raise UserError(f"{unknown[0]!r}: expected {', '.join(MODELS)}; {', '.join(PRECISIONS)}")
    device = jax.devices()[0] if a.topology == "none" else topology.devices(a.topology)[0]
    print(f"GB on {device.device_kind}, context {a.context}")
    columns = ("weights", "cache", "encode", "prefill", "decode", "peak", "target")
    print(f"{'model':6}{'precision':10}{'batch':>6}" + "".join(f"{c:>9}" for c in columns))
    for name in names:
        for precision in precisions:
            config = dataclasses.replace(MODELS[name], quantize=PRECISIONS[precision]).check()
            found = measure(config, device, batches, a.context, a.layers, a.decode_layers)
            for batch, values in zip(batches, found, strict=True):
                numbers = "".join(f"{v:9.3f}" for v in values.values())
                target = TARGETS.get((name, precision), "") if batch == 1 else ""
                print(f"{name:6}{precision:10}{batch:6}{numbers}{target:>9}", flush=True)


if __name__ == "__main__":
    run(main)
