"""The parts of gpu.py that run this package, each in a process of its own: gpu_parts.py PART SIZE LAYERS."""

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

START = time.perf_counter()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import sizes  # noqa: E402
from flax import nnx  # noqa: E402
from packing import padded_batch  # noqa: E402

from minigpt4_jax.checkpoint.loader import parameter_dtype  # noqa: E402
from minigpt4_jax.checkpoint.parameters import abstract_model  # noqa: E402
from minigpt4_jax.config import ModelConfig  # noqa: E402
from minigpt4_jax.data.packing import pack  # noqa: E402
from minigpt4_jax.inference.beam_search import BeamSearchConfig  # noqa: E402
from minigpt4_jax.inference.engine import Engine  # noqa: E402
from minigpt4_jax.inference.image_encoder import ImageEncoder  # noqa: E402
from minigpt4_jax.inference.requests import Request  # noqa: E402
from minigpt4_jax.models.minigpt import Batch, MiniGpt  # noqa: E402
from minigpt4_jax.quantization.schemes import FLOAT8, FLOAT8_DTYPE, holds_levels  # noqa: E402
from minigpt4_jax.training import optimizer  # noqa: E402
from minigpt4_jax.training.train_step import make_step, split_model, trained_parts  # noqa: E402
from minigpt4_jax.utils.platform import unrolls_layers  # noqa: E402

ON_GPU = jax.default_backend() == "gpu"
DTYPE = jnp.dtype(jnp.bfloat16)
PRODUCT, READ = "bfloat16 product", "read memory"  # ceilings
ROWS = (1, 8, 32) if ON_GPU else (1, 2)
PROMPTS = (128, 512, 2048) if ON_GPU else (16, 64)
NEW = 129 if ON_GPU else 5  # tokens of a timed answer


def report(name: str, value: float, unit: str, rate: float = 0, ceiling: str = "") -> None:
    """rate: what is compared with a ceiling of the same run."""
    figure = {"name": name, "value": value, "unit": unit}
    if rate:
        figure |= {"rate": rate, "ceiling": ceiling}
    print("figure", json.dumps(figure), flush=True)


def median_seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """Of a call that ends when the device is done; the first one, which compiles, is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# --- models and requests ------------------------------------------------------------------------


@partial(jax.jit, static_argnums=(1, 2))
def random_array(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.bits(key, shape, jnp.uint8).astype(dtype)
    deviation = 100.0 if dtype == FLOAT8_DTYPE else 0.02  # levels, or values
    return (deviation * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def random_model(config: ModelConfig, *, stacked: bool) -> MiniGpt:
    """A model with random weights, made on the device."""
    graphdef, state = nnx.split(abstract_model(config, stacked=stacked))
    leaves = []
    for i, (path, leaf) in enumerate(nnx.to_flat_state(state)):
        name, levels = str(path[-1]), holds_levels(leaf.dtype)
        dtype = jnp.dtype(leaf.dtype) if levels else parameter_dtype(path, DTYPE)
        if name == "scale":
            array = jnp.ones(leaf.shape, dtype)
        elif name.endswith("_scale"):
            array = jnp.full(leaf.shape, 2e-4, dtype)
        else:
            array = random_array(jax.random.key(i), tuple(leaf.shape), dtype)
        leaves.append((path, leaf.replace(array)))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


def requests(
    config: ModelConfig, rows: int, prompt: int, new: int, beams: int = 1
) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(
            rng.integers(5, config.llm.vocab, prompt).tolist(), max_new_tokens=new,
            beam_search=BeamSearchConfig(beams),
        )
        for _ in range(rows)
    ]  # fmt: skip


def weight_bytes(model: MiniGpt) -> int:
    """Bytes of the language model that a decoding step reads: the embedding is looked up."""
    flat = nnx.to_flat_state(nnx.state(model))
    return sum(
        leaf.get_value().nbytes for path, leaf in flat if path[0] == "llm" and path[1] != "embed"
    )


# --- parts --------------------------------------------------------------------------------------


def ceilings(config: ModelConfig) -> None:
    n = 8192 if ON_GPU else 512
    a = random_array(jax.random.key(0), (n, n), DTYPE)
    product = jax.jit(lambda a: a @ a)
    report(PRODUCT, 2 * n**3 / median_seconds(lambda: product(a)) / 1e12, "TFLOP/s")
    size = (4 << 30) if ON_GPU else (16 << 20)
    x = jnp.zeros(size // 2, DTYPE)
    read, copy = jax.jit(lambda x: x.astype(jnp.float32).sum()), jax.jit(lambda x: x + 1)
    report(READ, size / median_seconds(lambda: read(x)) / 1e9, "GB/s")
    report("copy memory", 2 * size / median_seconds(lambda: copy(x)) / 1e9, "GB/s")
    host = np.zeros(size // 4, np.uint8)
    report(
        "host to device", host.nbytes / median_seconds(lambda: jax.device_put(host)) / 1e9, "GB/s"
    )


def decode(config: ModelConfig, scheme: str) -> None:
    config = dataclasses.replace(config, quantize=None if scheme == "bfloat16" else scheme)
    model = random_model(config, stacked=False)
    engine, size = Engine(model), weight_bytes(model)
    report("weights", size / 1e9, "GB")
    for rows in ROWS:
        short, long = (requests(config, rows, PROMPTS[0], n) for n in (1, NEW))
        start = time.perf_counter()
        engine.answer(long, rows)
        report(f"batch {rows}: first call", time.perf_counter() - start, "s")
        if rows == 1:
            report("start to first answer", time.perf_counter() - START, "s")
        first = median_seconds(lambda batch=short, n=rows: engine.answer(batch, n), 3)
        whole = median_seconds(lambda batch=long, n=rows: engine.answer(batch, n), 3)
        step = (whole - first) / (NEW - 1)
        report(f"batch {rows}: a token", step * 1e3, "ms", size / step / 1e9, READ)
        report(f"batch {rows}: tokens", rows / step, "tokens/s")


def second_start(config: ModelConfig) -> None:
    """Programs come from the cache that the first process filled."""
    engine = Engine(random_model(config, stacked=False))
    report("weights on the device", time.perf_counter() - START, "s")
    start = time.perf_counter()
    engine.answer(requests(config, 1, PROMPTS[0], NEW), 1)
    report("first answer, weights there", time.perf_counter() - start, "s")


def prefill(config: ModelConfig) -> None:
    engine, m = Engine(random_model(config, stacked=False)), config.llm
    layer = m.width * (2 * m.heads + 2 * m.kv_heads) * m.head_dim + 3 * m.width * m.ffn
    for tokens in PROMPTS:
        batch = requests(config, 1, tokens, 1)
        seconds = median_seconds(lambda batch=batch: engine.answer(batch, 1), 3)
        flops = 2.0 * tokens * m.layers * (layer + tokens * m.heads * m.head_dim)
        report(f"{tokens} tokens", seconds * 1e3, "ms", flops / seconds / 1e12, PRODUCT)


def encode(config: ModelConfig) -> None:
    model = random_model(config, stacked=not unrolls_layers())
    graphdef, state = nnx.split(model)
    encoder, edge = ImageEncoder(graphdef, config, None), config.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 255, (ROWS[-1], edge, edge, 3), np.uint8)
    for count in (1, ROWS[-1]):
        images = list(pixels[:count])
        seconds = median_seconds(lambda images=images: encoder.encode(state, images), 3)
        flops = 2.0 * count * sizes.vision_macs(config.vision)
        report(f"{count} images", seconds * 1e3, "ms", flops / seconds / 1e12, PRODUCT)
        report(f"{count} images: rate", count / seconds, "images/s")


def step(config: ModelConfig, kind: str) -> None:
    if kind == FLOAT8:
        config = dataclasses.replace(config, quantize=FLOAT8)
    model = random_model(config, stacked=not unrolls_layers())
    split = split_model(model, trained_parts(freeze_vit=True, freeze_qformer=True), DTYPE)
    del model
    rows = 12 if ON_GPU else 2
    batch = sizes.make_batch(config, rows, 96 if ON_GPU else 8)
    if kind == "packed":
        arrays = padded_batch(config, 4 * rows, 0.2)
        batch = Batch(*pack(arrays, 512, config.visual_tokens, 0))
    tx = optimizer.adamw(split.decay_mask)
    train = make_step(split, tx, None, remat=kind == "remat")
    trainable = jax.tree.map(jnp.array, split.trainable)
    opt_state, on_device = tx.init(trainable), jax.device_put(batch)

    def one() -> Any:
        nonlocal trainable, opt_state
        trainable, opt_state, metrics = train(
            trainable, opt_state, split.frozen, on_device, 3e-5, 0
        )
        return metrics.loss

    start = time.perf_counter()
    loss = float(one())
    report("first step", time.perf_counter() - start, "s")
    seconds = median_seconds(lambda: [one() for _ in range(5)], 3) / 5
    rate = 0.0 if kind == "packed" else sizes.flops(config, batch) / seconds / 1e12
    report(
        f"a step of {len(batch.tokens)} x {batch.tokens.shape[1]}",
        seconds * 1e3,
        "ms",
        rate,
        PRODUCT,
    )
    examples = 4 * rows if kind == "packed" else rows
    report("examples", examples / seconds, "rows/s")
    report("400 steps of 12 examples", 400 * 12 * seconds / examples, "s")
    report("loss of the first step", loss, "")
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        report("peak memory", stats["peak_bytes_in_use"] / 1e9, "GB")


def answers(config: ModelConfig) -> None:
    """Beam search, and many answers of different lengths by continuous batching."""
    engine, rng = Engine(random_model(config, stacked=False)), np.random.default_rng(0)
    new = 64 if ON_GPU else 4
    beams = requests(config, 1, PROMPTS[0], new, 5 if ON_GPU else 2)
    report(f"5 beams, {new} tokens", median_seconds(lambda: engine.answer(beams, 5), 2) * 1e3, "ms")
    count = 128 if ON_GPU else 4
    lengths = zip(rng.integers(32, 129, count), rng.integers(8, 2 * NEW, count), strict=True)
    mixed = [requests(config, 1, int(prompt), int(n))[0] for prompt, n in lengths]
    seconds = median_seconds(lambda: engine.answer(mixed, 32), 1)
    total = sum(request.max_new_tokens for request in mixed)
    report(f"{count} mixed answers, 32 rows", total / seconds, "tokens/s")


PARTS: dict[str, Callable[[ModelConfig], None]] = {
    "ceilings": ceilings,
    "decode bfloat16": partial(decode, scheme="bfloat16"),
    "decode int8": partial(decode, scheme="int8"),
    "decode int4": partial(decode, scheme="int4"),
    "second start": second_start,
    "prefill": prefill,
    "encode": encode,
    "step": partial(step, kind="kept"),
    "step float8": partial(step, kind=FLOAT8),
    "step packed": partial(step, kind="packed"),
    "step remat": partial(step, kind="remat"),
    "answers": answers,
}

if __name__ == "__main__":
    PARTS[sys.argv[1]](sizes.model_config(sys.argv[2], int(sys.argv[3]) or None))
