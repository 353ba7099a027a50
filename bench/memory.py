"""How much memory a call takes, measured from outside."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


def extra_bytes(run: Callable[[], tuple[Tensor, ...]], device: str) -> int:
    """Return the growth of memory at its peak, without what the function returns: resident on the CPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - sum(tensor.nbytes for tensor in results)
    ctypes.CDLL(None).malloc_trim(0)  # so that memory kept from earlier calls is not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident("VmRSS")
    results = run()
    return _resident("VmHWM") - before - sum(tensor.nbytes for tensor in results)


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
