"""Run by test_sharding.py in a process with eight virtual devices: `sharded_quantized.py FOLDER`.

Quantized weights with LoRA and an int8 cache: a mesh generates the same tokens as one device.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from helpers.sharded_programs import MODELS, requests
from minigpt4_jax.checkpoint.loader import load_model
from minigpt4_jax.checkpoint.model_directory import Tensors
from minigpt4_jax.checkpoint.parameters import parameter_shapes
from minigpt4_jax.checkpoint.quantized_tensors import quantize_tensors
from minigpt4_jax.checkpoint.writer import write_model
from minigpt4_jax.config import LlmConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.models.kv_cache import QuantizedArray
from minigpt4_jax.parallel import sharding


def main(folder: Path) -> None:
    record_reads()
    rng = np.random.default_rng(0)
    llm = LlmConfig(  # two groups of inputs or more in every matrix
        vocab=800, width=128, layers=2, heads=8, kv_heads=4, head_dim=16, ffn=256
    )
    config = dataclasses.replace(MODELS["v2"], llm=llm).check()
    tensors = {
        name: (rng.normal(0, 0.15, shape) + name.endswith("scale")).astype(np.float32)
        for name, shape in parameter_shapes(config).items()
    }
    model_dir = write_model(folder / "model", config, tensors.items())
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    for scheme in ("int8", "int4"):
        generated = []
        for devices in (None, mesh):
            module, _ = load_model(model_dir, stacked=False, quantize=scheme, mesh=devices)
            module.llm.cache_kind = "int8"
            engine = Engine(module, devices)
            # with int8, a slot is filled again; int4 needs fewer programs
            asked = requests(config)[: 9 if scheme == "int8" else 8]
            generated.append(engine.generate(asked, batch_size=8))
        if scheme == "int8":
            assert isinstance(engine.prefill(asked[:8]).cache.k[0], QuantizedArray)
        split = module.llm.blocks[0].mlp.up.weight[...].sharding
        assert not split.is_fully_replicated and split.mesh.size == 8
        assert generated[0] == generated[1], (scheme, generated)
        assert len({tuple(ids) for ids in generated[0]}) > 4  # there is something to compare
        stored = dataclasses.replace(config, quantize=scheme)
        stored_dir = write_model(folder / scheme, stored, quantize_tensors(tensors.items(), scheme))
        check_sharded_load(stored_dir, mesh)
        check_sharded_load(model_dir, mesh, quantize=scheme)


def check_sharded_load(model_dir: Path, mesh: Mesh, **options: Any) -> None:
    """Sharded parameters equal those on one device, and no element is read twice."""
    for stacked in (True, False):
        single, _ = load_model(model_dir, stacked=stacked, **options)
        READ.clear()
        sharded, _ = load_model(model_dir, stacked=stacked, mesh=mesh, **options)
        a, b = (jax.tree.leaves(nnx.state(model)) for model in (single, sharded))
        assert any(not one.sharding.is_fully_replicated for one in b)
        for one, other in zip(a, b, strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
        if not options:  # quantizing while loading reads whole rows, for their scales
            assert max(READ.values()) <= 1.0 + 1e-9, READ


READ: dict[str, float] = {}  # parameter -> how often its elements were read


def record_reads() -> None:
    part = Tensors.part

    def recorded(self: Tensors, name: str, index: tuple[slice, ...]) -> np.ndarray:
        array = part(self, name, index)
        READ[name] = READ.get(name, 0.0) + array.size / max(1, int(np.prod(self.shape(name))))
        return array

    Tensors.part = recorded  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
