"""The benchmarks, one file each, and the table of their names."""

from minigpt4_jax.errors import UserError
from minigpt4_jax.evaluation.benchmark import Benchmark
from minigpt4_jax.evaluation.benchmarks import (
    aokvqa,
    captions,
    chair,
    gqa,
    hateful_memes,
    iconvqa,
    okvqa,
    pope,
    refcoco,
    scienceqa,
    shapes,
    textvqa,
    vizwiz,
    vqav2,
    vsr,
)
from minigpt4_jax.utils.text import spelling_hint

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        *refcoco.BENCHMARKS, okvqa.BENCHMARK, gqa.BENCHMARK, vsr.BENCHMARK, iconvqa.BENCHMARK,
        vizwiz.BENCHMARK, hateful_memes.BENCHMARK, *captions.BENCHMARKS, pope.BENCHMARK,
        *chair.BENCHMARKS, aokvqa.BENCHMARK, textvqa.BENCHMARK, scienceqa.BENCHMARK, vqav2.BENCHMARK,
        *shapes.BENCHMARKS,
    )
}  # fmt: skip


def find(name: str) -> Benchmark:
    """The benchmark of a name. UserError: there is none."""
    if name not in BENCHMARKS:
        raise UserError(f"benchmark {name!r} is not known; {spelling_hint(name, BENCHMARKS)}")
    return BENCHMARKS[name]
