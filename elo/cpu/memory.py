"""The host's memory: the C library's allocator, and what a process has taken."""

import ctypes
import os
import resource
from contextlib import suppress

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


def peak_resident_memory() -> int:
    """Bytes of this process at the highest point so far."""
    with suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # or what the one that started it had, if more
