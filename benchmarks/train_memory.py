"""What a training step of MiniGPT-v2 7B would take on one device, without having one.

    python benchmarks/train_memory.py [--rows=1] [--text=1024] [--no-remat] [--packed] [--layers=32]
    TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu python benchmarks/train_memory.py --tpu=v5p:2x2x1

compiles the step at full size from shapes alone (448 px, 256 visual tokens and `--text` others a
row, projection and LoRA trained) and prints what the compiler says it needs: arguments (weights,
trained masters, optimizer, batch) and temporaries (activations). The compiler is that of the
backend at hand; on a CPU temporaries hold float32 copies of weights and activations, so they bound
from above what an accelerator needs. --tpu compiles for one chip of a topology instead, which takes
libtpu and no TPU.
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from minigpt4_jax import optim
from minigpt4_jax.config import LlmConfig, LoraConfig, ModelConfig, VisionConfig
from minigpt4_jax.models.minigpt import Batch, MiniGpt
from minigpt4_jax.training.step import Split, make_step, split_model, trained_parts
from minigpt4_jax.weights import parameter_dtype

PARTS = trained_parts(freeze_vit=True, freeze_qformer=True)
DEVICE_GB = 80
BF16 = jnp.dtype(jnp.bfloat16)


def v2(layers: int) -> ModelConfig:
    """MiniGPT-v2 with Llama-2 7B, its language model cut to `layers` layers."""
    return ModelConfig(
        variant="minigpt-v2", vision=VisionConfig(image_size=448), qformer=None, merge_patches=4,
        llm=LlmConfig(eps=1e-5, max_length=4096, layers=layers), lora=LoraConfig(),
    ).check()  # fmt: skip


def batch_shapes(config: ModelConfig, rows: int, text: int, packed: bool) -> Batch:
    """Rows of one image each, half of the text labelled."""
    t, edge = text + config.visual_tokens, config.vision.image_size

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    pixels: Any = jax.ShapeDtypeStruct((rows, 1, edge, edge, 3), jnp.uint8)
    extra = [ints(rows, t)] * 3 if packed else []
    return Batch(pixels, ints(rows, t), ints(rows), ints(rows, text // 2), *extra)


def shapes_of(config: ModelConfig) -> tuple[Split, Any]:
    """(how the model is taken apart, shapes of the trained and the frozen arrays)"""
    kept: list[Split] = []

    def build() -> Any:
        graphdef, state = nnx.split(MiniGpt(config, nnx.Rngs(0)))
        flat = [
            (path, leaf.replace(leaf.get_value().astype(parameter_dtype(path, BF16))))
            for path, leaf in nnx.to_flat_state(state)
        ]
        model = nnx.merge(graphdef, nnx.from_flat_state(flat))
        kept.append(split_model(model, PARTS, BF16))
        return kept[0].trainable, kept[0].frozen

    shapes = jax.eval_shape(build)
    return kept[0], shapes


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--rows", type=int, default=1)
    p.add_argument("--text", type=int, default=1024)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--no-remat", action="store_true")
    p.add_argument("--tpu", metavar="TOPOLOGY", help="for instance v5p:2x2x1")
    p.add_argument("--packed", action="store_true", help="rows with segments")
    args = p.parse_args()
    config = v2(args.layers)
    kept, (trainable, frozen) = shapes_of(config)
    tx = optim.adamw(kept.decays)
    step = make_step(kept, tx, remat=not args.no_remat, dropout_seed=0, dropout_in=["lora"])
    batch = batch_shapes(config, args.rows, args.text, args.packed)
    scalars = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
    begun = time.perf_counter()
    opt_state = jax.eval_shape(tx.init, trainable)
    shapes = (trainable, opt_state, frozen, batch, *scalars)
    if args.tpu:
        compiled, device = compile_for_tpu(step, shapes, args.tpu)
    else:
        compiled, device = step.lower(*shapes).compile(), jax.devices()[0]
    seconds = time.perf_counter() - begun
    report(config, args, compiled.memory_analysis(), device.device_kind, seconds)


def compile_for_tpu(step: Any, shapes: Any, name: str) -> tuple[Any, Any]:
    """(the compiled step, the chip of the topology that it is for)"""
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    chip = topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
    here = SingleDeviceSharding(chip)
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here), shapes)
    jax.default_backend = lambda: "tpu"  # the model asks, to go round what is slow on a CPU
    return step.trace(*shapes).lower(lowering_platforms=("tpu",)).compile(), chip


def report(
    config: ModelConfig, args: argparse.Namespace, memory: Any, device: str, seconds: float
) -> None:
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    rows, t = args.rows, args.text + config.visual_tokens
    print(
        f"{config.variant} {config.llm.layers} layers, {rows} x {t} tokens, "
        f"remat {not args.no_remat}, {device}, compiled in {seconds:.0f} s"
    )
    for name, size in sizes.items():
        print(f"{name:14}{size / 1e9:8.2f} GB")
    total = sum(sizes.values())
    print(f"{'together':14}{total / 1e9:8.2f} GB of {DEVICE_GB} GB")


if __name__ == "__main__":
    main()
