"""Compile a model's programs in threads, before they are called and without its weights.

Compilation needs only shapes. It releases Python's interpreter lock, so several programs are compiled at
the same time, and while weights are read. JAX finds what was compiled here when the model calls it.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding

from minigpt4_jax.inference.requests import Request
from minigpt4_jax.inference.text_generator import TextGenerator
from minigpt4_jax.parallel.sharding import replicated

log = logging.getLogger(__name__)
ShapeDtypeStruct: Any = jax.ShapeDtypeStruct  # JAX does not annotate its constructor
# The compiler itself uses several threads, and a program of a large model a gigabyte of memory or more.
THREADS = min(8, max(2, (os.cpu_count() or 1) // 2))


class CompileSummary(NamedTuple):
    """What a `ProgramCompiler` has done."""

    programs: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.programs} programs compiled by {THREADS} threads in {self.seconds:.1f} s"


class ProgramCompiler:
    """Compiles the programs that a model's methods would run.

        with ProgramCompiler(model) as compiler:
            compiler.start(lambda planned: planned.engine.prefill([request]))
            ...  # for instance read weights
            compiler.wait()

    Attributes:
        planned: the model, but its programs are traced and compiled instead of run: they take shapes or
            arrays, and give shapes. (Visual tokens are zeros.)
    """

    def __init__(self, model: TextGenerator):
        """model: its parameters may be shapes (`checkpoint.loader.model_shapes`)."""
        self.planned = model.with_programs(self._planned)
        sharding: Any = model.engine.leaves[0].sharding
        self._is_sharded = sharding.num_devices > 1
        has_mesh = isinstance(model.engine.leaves[0].sharding, NamedSharding)
        self._out_sharding = replicated(sharding.mesh) if has_mesh else sharding
        self._begin = time.monotonic()
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="compile")
        self._compiled: dict[Hashable, Future[Any]] = {}
        self._results: dict[Hashable, Any] = {}  # shapes
        self._planner: threading.Thread | None = None

    def __enter__(self) -> "ProgramCompiler":
        return self

    def __exit__(self, *error: object) -> None:
        # After an error what has not begun is not compiled any more; the planner ends at its next program.
        self._pool.shutdown(wait=error[0] is None, cancel_futures=True)
        # A thread that still traces when the interpreter ends aborts the process.
        if self._planner is not None:
            self._planner.join()

    def start(self, plan: Callable[[TextGenerator], object]) -> None:
        """Call `plan` with `planned`, in a thread. What it raises is only logged, as the real call raises it
        too."""

        def run() -> None:
            try:
                plan(self.planned)
            except Exception as e:
                log.debug("programs are not compiled ahead: %s", e)

        self._planner = threading.Thread(target=run, name="plan", daemon=True)
        self._planner.start()

    def wait(self) -> CompileSummary:
        """Wait until everything that was planned is compiled."""
        if self._planner is not None:
            self._planner.join()
        for compiled in futures.wait(self._compiled.values()).done:
            if not compiled.cancelled() and (error := compiled.exception()):
                log.debug("not compiled ahead: %s", error)
        return CompileSummary(len(self._compiled), time.monotonic() - self._begin)

    def _planned(self, program: Any) -> Callable[..., Any]:
        """A compiled function (of jax.jit) -> one that compiles it for its arguments and gives the result's
        shapes."""

        def compile_only(*args: Any) -> Any:
            key = id(program), _signature(args)
            if key not in self._results:  # even the lowering of a known program takes time
                lowered = program.lower(*args)
                self._compiled[key] = self._pool.submit(lowered.compile)
                self._results[key] = self._result_shapes(lowered, self._compiled[key])
            return self._results[key]

        return compile_only

    def _result_shapes(self, lowered: Any, compiled: Future[Any]) -> Any:
        """The shapes and shardings of what a program returns."""
        if self._is_sharded:  # the compiler decides how results are split
            return jax.tree.map(_shape, lowered.out_info, compiled.result().output_shardings)
        return jax.tree.map(lambda a: _shape(a, self._out_sharding), lowered.out_info)


def compile_answer(planned: TextGenerator, request: Request) -> None:
    """Plan what a conversation runs for its first answer. planned: of a `ProgramCompiler`."""
    engine = planned.engine
    if request.beam_search.num_beams > 1:
        engine.search_batch([request])
        return
    sizes, stages = engine.bucket_sizes([request]), engine.stages([request])
    state = engine.prefill([request], sizes, stages)
    engine.snapshot(state)
    engine.snapshot(engine.decode(state, stages))


def _shape(a: Any, sharding: Any) -> Any:
    return ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding, weak_type=a.weak_type)


def _signature(args: Any) -> Hashable:
    """What a program is compiled for."""
    leaves, tree = jax.tree.flatten(args)
    return tree, tuple(
        (a.shape, a.dtype, getattr(a, "sharding", None), getattr(a, "weak_type", False))
        if hasattr(a, "shape")
        else a
        for a in leaves
    )
