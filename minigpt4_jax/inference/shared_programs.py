"""Compiled functions of models, which all models of the same structure in a process share: a model that is
loaded again, or another checkpoint of it, traces and compiles nothing."""

import os
from collections.abc import Callable, Hashable
from functools import cache, lru_cache, wraps
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from minigpt4_jax.models.attention import CUDNN_VARIABLE
from minigpt4_jax.parallel.sharding import with_mesh
from minigpt4_jax.utils.platform import backend, compiler_options, compute_capability

Program = Callable[..., Any]  # a function that jax.jit made
MAX_STRUCTURES = (
    32  # whose programs stay in memory; a model has two: parameters as leaves, and as a state
)


def shared_programs(
    graphdef: Hashable, mesh: Mesh | None, treedef: Hashable | None = None
) -> Callable[..., Any]:
    """A function `compiled(program, bound="products", **options)` for models of this structure on a mesh.

    It returns `program(model, ...)`, a function of a module, as a compiled function of (state, ...): the
    model's parameters, or with `treedef` their leaves, of which it is the structure. bound: see
    `compiler_options`. options: of jax.jit.
    """
    return _shared_programs(graphdef, mesh, treedef, _platform())


def shared_jit(function: Callable[..., Any], mesh: Mesh | None, **options: Any) -> Any:
    """A function that uses no model, compiled. options: of jax.jit."""
    return _shared_jit(function, mesh, _platform(), **options)


def clear_programs() -> None:
    """Models that are made from now on compile programs of their own. Those of models that are not used any
    more are freed."""
    _shared_programs.cache_clear()
    _shared_jit.cache_clear()


def _platform() -> Hashable:
    """What programs are traced for (`compiling_for`), besides their arguments."""
    return backend(), compute_capability(), os.environ.get(CUDNN_VARIABLE)


@lru_cache(maxsize=4 * MAX_STRUCTURES)
def _shared_jit(
    function: Callable[..., Any], mesh: Mesh | None, platform: Hashable, **options: Any
) -> Any:
    return jax.jit(with_mesh(function, mesh), **options)


@lru_cache(maxsize=MAX_STRUCTURES)
def _shared_programs(
    graphdef: Any, mesh: Mesh | None, treedef: Any, platform: Hashable
) -> Callable[..., Any]:
    @cache
    def compiled(program: Callable[..., Any], bound: str = "products", **options: Any) -> Any:
        @wraps(program)
        def of_state(state: Any, *args: Any) -> Any:
            if treedef is not None:
                state = jax.tree.unflatten(treedef, state)
            return program(nnx.merge(graphdef, state), *args)

        return jax.jit(
            with_mesh(of_state, mesh), compiler_options=compiler_options(bound), **options
        )

    return compiled
