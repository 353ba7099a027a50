"""Keep the C library from giving freed memory back to the system between the steps of a run."""

from __future__ import annotations

import ctypes
import platform

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let glibc reuse the blocks it has; return whether it could be told so.

    By default every block above 32 MB is mapped anew and unmapped on release, and the top of the heap is trimmed. A
    training step on the CPU frees and takes the same activations again, so all their pages are faulted in at each step:
    ``python -m bench.page_faults`` shows what that costs. The process then keeps the memory of its largest step, which
    it needs again for the next.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
