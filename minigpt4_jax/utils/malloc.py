"""glibc malloc settings that keep freed memory in the process, for the next training step."""

import ctypes
import sys

# mallopt's parameter numbers (glibc's malloc.h)
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory; True if that worked (Linux with glibc).

    On a CPU every step allocates and frees hundreds of megabytes of temporary arrays. By default malloc
    returns them to the system, which zeroes the pages again for the next step: an eighth of its time.
    For processes whose purpose is training; call it before the first step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    # One arena, as only the main arena grows by sbrk; no mmap for large blocks; no trimming.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
    return all(mallopt(name, value) == 1 for name, value in settings)
