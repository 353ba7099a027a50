"""Run losses, fusion, prediction and depthwise convolutions on the CPU with the C++ kernels of csrc."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pseudoseg_fast import build
from pseudoseg_fast.backends.native import (
    consistency_loss,
    cross_entropy,
    depthwise_conv2d,
    dice_loss,
    fuse_predictions,
    load,
    predict_labels,
    soft_cross_entropy,
)

__all__ = [
    "FUNCTIONS",
    "consistency_loss",
    "cross_entropy",
    "depthwise_conv2d",
    "dice_loss",
    "fuse_predictions",
    "predict_labels",
    "refusal",
    "soft_cross_entropy",
]

FUNCTIONS = (
    "consistency_loss",
    "cross_entropy",
    "depthwise_conv2d",
    "dice_loss",
    "fuse_predictions",
    "predict_labels",
    "soft_cross_entropy",
)


def refusal(function: str, tensors: Sequence[Tensor]) -> str:
    """Return why the kernels, built if need be, cannot run a function on these tensors, or an empty string."""
    if function not in FUNCTIONS:
        return f"it has kernels for {', '.join(FUNCTIONS)}; use backend='eager'"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it needs CPU tensors, got one on {tensor.device}; use backend='auto'"
    if function == "depthwise_conv2d" and tensors[0].dtype not in (torch.float32, torch.float64):
        return f"it convolves in float32 and float64, got {tensors[0].dtype}; use backend='auto'"
    return _load()


_loaded: list[str] = []


@torch.compiler.assume_constant_result
def _load() -> str:
    """Load the operators once, with their shapes and derivatives; return why not, or an empty string."""
    if not _loaded:  # not functools.cache: torch.compile looks through it and traces the build
        _loaded.append(load(build.load_cpu, "CPU"))
    return _loaded[0]
