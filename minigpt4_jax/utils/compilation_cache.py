"""JAX's persistent compilation cache: a command that ran before starts without compiling.

On a GPU it also holds what XLA's autotuning has found (jax_persistent_cache_enable_xla_caches, whose default
JAX applies to the folder that is set here), so that a changed program is not tuned again from nothing.
"""

import hashlib
import os
import platform
from pathlib import Path

VARIABLE = "MINIGPT4_JAX_CACHE"  # the folder of the cache; empty, 0 or off: no cache
MIN_SECONDS = 0.1  # programs that were compiled faster are not kept


def enable_compilation_cache() -> Path | None:
    """Enable JAX's persistent compilation cache, unless the user configured one or disabled it.

    Returns its folder in the user's cache directory; None without a cache. Each CPU type has its own
    folder, because a program compiled for one may not run on another.
    """
    import jax

    setting = os.environ.get(VARIABLE, "default")
    configured = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if setting.lower() in ("", "0", "off") or configured:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    root = Path(home) / "minigpt4_jax" if setting == "default" else Path(setting)
    folder = root / f"xla-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # the cache is optional
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
    return folder


def _processor() -> str:
    """A hash that identifies this machine's instruction set."""
    text = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    return hashlib.sha256(text.encode()).hexdigest()[:12]
