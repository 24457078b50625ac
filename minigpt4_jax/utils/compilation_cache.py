"""Compiled programs are kept on disk, so that a command that ran before starts at once."""

import hashlib
import os
import platform
from pathlib import Path

VARIABLE = "MINIGPT4_JAX_CACHE"  # another folder; empty, 0 or off: no cache


def enable_compilation_cache() -> Path | None:
    """Switch on JAX's persistent compilation cache, unless the user set one up or wants none.

    Returns its folder: under the user's cache directory, one for each kind of processor, because
    a program compiled for one may not run on another. None when there is no cache.
    """
    import jax

    wanted = os.environ.get(VARIABLE, "default")
    set_up = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if wanted.lower() in ("", "0", "off") or set_up:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = Path(home) / "minigpt4_jax" if wanted == "default" else Path(wanted)
    folder = root / f"xla-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a cache that cannot be had is no reason to stop
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def _processor() -> str:
    """A short name for this machine's instruction set."""
    text = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(text.encode()).hexdigest()[:12]
