"""Tests of the Triton kernels on the CPU, for a pytest process of their own with TRITON_INTERPRET=1.

tests/test_triton.py starts it; by hand: TRITON_INTERPRET=1 python -m pytest tests/interpreter
"""

import os

import pytest
import torch

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

_GUARD = 256  # elements before and after every tensor
_empty, _new_empty = torch.empty, torch.Tensor.new_empty


@pytest.fixture(autouse=True)
def _guarded(monkeypatch):
    """Give kernels memory that is NaN until they write it, between guards that they must not write."""
    buffers = []

    def guarded(*shape, dtype=None, device="cpu"):
        inner = _empty(*shape, dtype=dtype, device="meta")
        buffer = _empty(inner.numel() + 2 * _GUARD, dtype=inner.dtype, device=device)
        buffer.fill_(torch.nan if inner.is_floating_point() else 111)
        buffers.append(buffer)
        return buffer[_GUARD : _GUARD + inner.numel()].view(inner.shape)

    def new_guarded(tensor, shape, dtype=None, **options):
        if shape == 0:  # the interpreter's own
            return _new_empty(tensor, shape, dtype=dtype, **options)
        return guarded(shape, dtype=dtype or tensor.dtype, device=tensor.device)

    monkeypatch.setattr(torch, "empty", guarded)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_guarded)
    yield
    for buffer in buffers:
        guards = torch.cat([buffer[:_GUARD], buffer[-_GUARD:]])
        assert (guards.isnan() if buffer.is_floating_point() else guards == 111).all()
