"""Run the losses and the prediction on a GPU with the CUDA kernels of csrc/cuda, without any full-size map."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pseudoseg_fast import build
from pseudoseg_fast.backends.native import (
    consistency_loss,
    cross_entropy,
    dice_loss,
    load,
    predict_labels,
    soft_cross_entropy,
)

__all__ = [
    "FUNCTIONS",
    "MAX_CLASSES",
    "consistency_loss",
    "cross_entropy",
    "dice_loss",
    "predict_labels",
    "refusal",
    "soft_cross_entropy",
]

FUNCTIONS = ("consistency_loss", "cross_entropy", "dice_loss", "predict_labels", "soft_cross_entropy")
MAX_CLASSES = 1024
"""The classes that a block can hold; half of that in float64 (csrc/cuda/work.cuh)."""


def refusal(function: str, tensors: Sequence[Tensor]) -> str:
    """Return why the kernels, built if need be, cannot run a function on these tensors, or an empty string."""
    if function not in FUNCTIONS:
        return f"it has kernels for {', '.join(FUNCTIONS)}; use backend='auto'"
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"it needs CUDA tensors, got one on {tensor.device}; use backend='auto'"
    classes = tensors[0].shape[1]
    most = MAX_CLASSES // 2 if any(tensor.dtype == torch.float64 for tensor in tensors) else MAX_CLASSES
    if classes > most:
        return f"it takes up to {most} classes, got {classes}; use backend='eager'"
    return _load()


_loaded: list[str] = []


@torch.compiler.assume_constant_result
def _load() -> str:
    """Load the operators once, with their shapes and derivatives; return why not, or an empty string."""
    if not _loaded:  # not functools.cache: torch.compile looks through it and traces the build
        _loaded.append(load(build.load_cuda, "CUDA"))
    return _loaded[0]
