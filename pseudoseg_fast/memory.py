"""Memory: keeping what was freed for the next step, its peak, and what fits when there is not enough."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress

import torch

from pseudoseg_fast.finite import NotFinite

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4

OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: can't allocate memory|CUDA error: out of memory|_ALLOC(ATION)?_FAILED"
    r"|could not create a (primitive|memory object)\b(?! desc)"
    r"|std::bad_alloc"
)
"""How torch's allocator on the CPU, the CUDA runtime, cuBLAS and cuDNN, oneDNN, and kernels in C++ say so."""


class OutOfMemory(RuntimeError):
    """Memory has run out; the message says what to do."""


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


def peak_memory(device: torch.device) -> float:
    """Return the most MiB that tensors held on a CUDA device, or that this process had resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that the device, or the machine, has no memory left."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(OUT_OF_MEMORY.search(str(error)))


def largest_batch(attempt: Callable[[int], object], most: int) -> int:
    """Return the largest batch size up to ``most`` that fits into memory, found by halving; 0 if none does.

    Args:
        attempt: takes a step with a batch of the given size. It runs out of memory if that is too large, and raises
            ``ValueError`` if it is too small, as batch norms do that get one value per channel.
        most: the largest size to try.
    """
    best, low, high = 0, 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        try:
            with suppress(NotFinite):  # there was memory for it
                attempt(middle)
            best = low = middle
        except ValueError:
            low = middle
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            high = middle
    return best
