"""Host memory that a training step frees stays with the process for the next step."""

import ctypes
import sys

# mallopt's parameter numbers (glibc's malloc.h)
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tell malloc to keep what is freed; True where that worked (Linux with glibc).

    On a CPU the temporary arrays of a step, hundreds of megabytes, are allocated and freed by every
    step. By default each goes back to the system, which clears its pages again for the next one: an
    eighth of the step's time. Call this before the first step, when the process exists to train.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    # One arena, because only the first can grow; no maps of their own for big blocks; no trimming.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(name, value) == 1 for name, value in settings)
