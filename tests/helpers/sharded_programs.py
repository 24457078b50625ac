"""Run by test_sharding.py in a process with eight virtual devices: `sharded_programs.py OUT`.

It writes to OUT the results of a training step for every model and mesh of TRAINED, and of the engine for
those of GENERATED, and the results on one device for the same inputs.
"""

import functools
import itertools
import math
import re
import sys

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from minigpt4_jax.checkpoint.parameters import abstract_model
from minigpt4_jax.config import (
    IMAGE,
    LlmConfig,
    LoraConfig,
    ModelConfig,
    QFormerConfig,
    VisionConfig,
)
from minigpt4_jax.inference.beam_search import BeamSearchConfig
from minigpt4_jax.inference.engine import Engine
from minigpt4_jax.inference.requests import Request
from minigpt4_jax.inference.sampling import SamplingParams
from minigpt4_jax.models.llm import unstack
from minigpt4_jax.models.minigpt import Batch, MiniGpt
from minigpt4_jax.parallel import sharding
from minigpt4_jax.training.train_step import make_step, split_model, trained_parts

VISION = VisionConfig(image_size=28, patch_size=14, width=64, depth=2, heads=8, mlp=96)
QFORMER = QFormerConfig(queries=4, hidden=64, layers=2, heads=8, ffn=96, vision_width=64, dropout=0)
LLM = LlmConfig(vocab=800, width=64, layers=2, heads=8, kv_heads=8, head_dim=8, ffn=96)
MODELS = {
    "qformer": ModelConfig(vision=VISION, qformer=QFORMER, llm=LLM),
    "patches": ModelConfig(variant="minigpt4-llama2", vision=VISION, qformer=None, llm=LLM),
    "v2": ModelConfig(
        variant="minigpt-v2", vision=VISION, qformer=None, lora=LoraConfig(rank=4, dropout=0.0),
        llm=LlmConfig(vocab=800, width=64, layers=2, heads=8, kv_heads=4, head_dim=8, ffn=96),
    ),
    # heads, key heads, FFN, vocabulary and widths are all odd
    "odd": ModelConfig(
        vision=VisionConfig(image_size=28, patch_size=14, width=33, depth=2, heads=3, mlp=45),
        qformer=QFormerConfig(
            queries=3, hidden=35, layers=1, heads=5, ffn=45, vision_width=33, dropout=0
        ),
        llm=LlmConfig(vocab=801, width=45, layers=2, heads=9, kv_heads=3, head_dim=6, ffn=51),
    ),
}  # fmt: skip
Shape = tuple[int, int, int]  # sizes of the axes of a mesh, in the order of AXES
SHAPES = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(s) == 8]  # all of them
MIXED = (2, 2, 2)
# Every mesh trains some model, and every kind of mesh generates: split by one axis, by two or by all.
GENERATED = {
    "qformer": [MIXED, (8, 1, 1), (1, 1, 8)],
    "v2": [(1, 8, 1), (4, 1, 2), (1, 1, 8)],  # fewer key heads than devices on the last
    "odd": [MIXED, (1, 2, 4)],
}
TRAINED = {
    "qformer": [*GENERATED["qformer"], (2, 1, 4)],
    "v2": [*GENERATED["v2"], (4, 2, 1)],
    "odd": GENERATED["odd"],
    # "patches" has the language model of "qformer", so only its vision side is compared.
    "patches": [(1, 4, 2), (2, 4, 1)],
}
assert {shape for shapes in TRAINED.values() for shape in shapes} == set(SHAPES)
CASES = [(name, shape) for name, shapes in TRAINED.items() for shape in shapes]
# With fewer slots than requests; on other meshes each request has its own slot: fewer programs.
REFILLED = {(8, 1, 1), (1, 1, 8), MIXED}
SEARCHED = {("qformer", MIXED), ("qformer", (1, 1, 8))}
COMPILED: list[str] = []  # an entry for each program that XLA compiled
VARIANTS = {"plain": {}, "accumulate": {"accumulate": 2, "remat": True}}


@functools.cache
def parameters(config: ModelConfig) -> dict:
    """Path -> random array, with values large enough that outputs depend on inputs."""
    rng = np.random.default_rng(0)
    flat = nnx.to_flat_state(nnx.state(abstract_model(config)))
    return {
        path: (rng.normal(0, 0.15, leaf.shape) + (path[-1] == "scale")).astype(np.float32)
        for path, leaf in flat
    }


def model_on(config: ModelConfig, mesh) -> MiniGpt:
    arrays = parameters(config)
    graphdef, state = nnx.split(abstract_model(config))
    flat = []
    for path, leaf in nnx.to_flat_state(state):
        where = sharding.parameter_sharding(
            ".".join(map(str, path)), leaf.shape, leaf.dtype, config, mesh
        )
        flat.append((path, leaf.replace(jax.device_put(arrays[path], where))))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def batch(config: ModelConfig) -> Batch:
    rng = np.random.default_rng(1)
    rows, t, a = 16, 16, 4
    tokens = rng.integers(3, 700, (rows, t)).astype(np.int32)
    tokens[:, 1 : 1 + config.visual_tokens] = IMAGE
    lengths = rng.integers(10, t + 1, rows).astype(np.int32)
    answers = np.full((rows, a), -1, np.int32)
    for i, n in enumerate(lengths):
        answers[i, : 1 + i % a] = np.arange(n - 1 - i % a, n)
    size = config.vision.image_size
    return Batch(
        rng.normal(size=(rows, 1, size, size, 3)).astype(np.float32), tokens, lengths, answers
    )


def requests(config: ModelConfig, beams: int = 1) -> list[Request]:
    """Nine requests, greedy and sampled: with eight slots, one is refilled."""
    rng = np.random.default_rng(2)
    made = []
    for i in range(9):
        tokens = [1, *[IMAGE] * config.visual_tokens, *rng.integers(3, 700, 3 + i).tolist()]
        visual = rng.normal(size=(config.visual_tokens, config.llm.width)).astype(np.float32)
        options = (
            SamplingParams(temperature=0.8, top_k=50) if i % 2 and beams == 1 else SamplingParams()
        )
        made.append(Request(tokens, visual, 6 + i % 3, options, i, [], BeamSearchConfig(beams)))
    return made


def train_step_results(config: ModelConfig, mesh, **options) -> dict[str, np.ndarray]:
    """Loss and gradient of one step."""
    parts = trained_parts(freeze_vit=True, freeze_qformer=True)
    split = split_model(model_on(config, mesh), parts, np.dtype("float32"))
    before = jax.tree.map(np.array, split.trainable)
    tx = optax.identity()  # the update is the gradient
    trainable = jax.device_put(split.trainable, sharding.replicated(mesh))
    rows = sharding.shard_batch(batch(config), mesh)
    args = (trainable, tx.init(before), split.frozen, rows, 1.0, 0)
    step = make_step(split, tx, mesh, **options).lower(*args).compile()
    check_traffic(step.as_text(), mesh, before)
    after, _, metrics = step(*args)
    gradient = jax.tree.map(lambda old, new: old - np.asarray(new), before, after)
    return {"loss": np.asarray(metrics.loss), **gradient}


def check_traffic(program: str, mesh, trainable: dict[str, np.ndarray]) -> None:
    """Check collectives: with data parallelism only the gradient and a few numbers are exchanged; with
    fsdp, one layer at a time."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    transfers = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", program)
    shapes = [dims.split(",") for line in transfers for dims in re.findall(r"\w\[([\d,]+)\]", line)]
    sizes = [math.prod(map(int, dims)) for dims in shapes]
    if mesh.shape["data"] == mesh.size > 1:
        assert sum(sizes) <= sum(a.size for a in trainable.values()) + 100, transfers
    if mesh.shape["fsdp"] == mesh.size > 1:  # both layers stacked; a 4 is LoRA's rank
        assert not [d for d in shapes if len(d) == 3 and d[0] == "2" and "4" not in d], transfers


def engine_results(config: ModelConfig, mesh, searched: bool, slots: int) -> dict[str, np.ndarray]:
    model = model_on(config, mesh)
    model.llm = unstack(model.llm)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(nnx.state(model))]
    assert {s.mesh for s in shardings if isinstance(s, NamedSharding)} == {mesh}
    engine = Engine(model, mesh)
    answers = engine.answer(requests(config), batch_size=slots)
    found = {"ids": [a[0].ids for a in answers], "logprobs": [a[0].logprobs for a in answers]}
    if searched:
        best = [a for some in engine.answer(requests(config, beams=2)) for a in some]
        found |= {"beam ids": [a.ids for a in best], "beam scores": [[a.score] for a in best]}
    before = len(COMPILED)
    again = engine.answer(requests(config), batch_size=slots)
    assert [a[0].ids for a in again] == [a[0].ids for a in answers]
    assert len(COMPILED) == before, COMPILED[before:]
    return {name: np.concatenate(rows) for name, rows in found.items()}


def results(name: str, shape: Shape | None, mesh: Mesh) -> dict[str, np.ndarray]:
    """What is compared on a mesh. shape None: one device, with all that any mesh of the model needs."""
    config, searched = MODELS[name].check(), (name, shape or MIXED) in SEARCHED
    found = {}
    if shape in [None, *GENERATED.get(name, [])] and name in GENERATED:
        slots = 8 if shape is None or name == "odd" or shape in REFILLED else 16
        found |= engine_results(config, mesh, searched, slots)
    for variant, options in VARIANTS.items():
        if variant == "plain" or searched:
            step = train_step_results(config, mesh, **options)
            found |= {f"{variant} {key}": value for key, value in step.items()}
    return found


def main(out: str) -> None:
    arrays = {}
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: COMPILED.append(event) if "backend_compile" in event else None
    )
    for name, shapes in TRAINED.items():
        single = results(name, None, sharding.single_device_mesh())
        arrays |= {f"{name}|one|{key}": value for key, value in single.items()}
        for shape in shapes:
            mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape, strict=True)))
            found = results(name, shape, mesh)
            arrays |= {f"{name}|{shape}|{key}": value for key, value in found.items()}
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
