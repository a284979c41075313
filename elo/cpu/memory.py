"""The C library's allocator."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Keep what a CPU's tensors free for those that follow, unless the environment sets the allocator otherwise.

    glibc hands large blocks back to the kernel, which clears every page anew when they come again: a tenth or more of
    the time of a full training step (docs/performance.md).
    """
    is_set = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt and not is_set:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
