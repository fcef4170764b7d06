"""How Linux hands memory to a process that allocates and frees the same large tensors at every step.

By default glibc gives freed memory back to the system at once, and the next step gets it again page by page, each at
the cost of a fault (docs/BENCHMARKS.md).
"""

import ctypes
import os

# Up to so much freed memory stays with the process.
KEPT_BYTES = 512 * 2**20
# Larger blocks are mapped anew each time: the largest value that glibc takes.
LARGEST_KEPT_BLOCK = 32 * 2**20
# glibc's malloc.h, and the environment variables that say the same.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES), "MALLOC_MMAP_THRESHOLD_": str(LARGEST_KEPT_BLOCK)}


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed; whether it does. Another allocator is left alone, and so is the user's choice.

    A choice is any of the variables of `ENVIRONMENT`.
    """
    if not ENVIRONMENT.keys().isdisjoint(os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows.
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BLOCK)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES))
