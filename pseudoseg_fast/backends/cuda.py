"""Run the losses and the prediction on a GPU with the CUDA kernels of csrc/cuda, without any full-size map."""

import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pseudoseg_fast import build
from pseudoseg_fast.backends.native import (
    consistency_loss,
    cross_entropy,
    predict_labels,
    register,
    soft_cross_entropy,
)

__all__ = [
    "FUNCTIONS",
    "MAX_CLASSES",
    "can_run",
    "consistency_loss",
    "cross_entropy",
    "predict_labels",
    "soft_cross_entropy",
]

logger = logging.getLogger(__name__)

FUNCTIONS = ("consistency_loss", "cross_entropy", "predict_labels", "soft_cross_entropy")
MAX_CLASSES = 1024
"""The classes that a block can hold; half of that in float64 (csrc/cuda/work.cuh)."""


def can_run(function: str, tensors: Sequence[Tensor], *, raise_error: bool = False) -> bool:
    """Tell whether the kernels can run a public function on these tensors; build them at the first question.

    Raises:
        RuntimeError: with ``raise_error``, why they cannot.
    """
    reason = _reason(function, tensors)
    if reason and raise_error:
        raise RuntimeError(f"backend 'cuda' cannot run {function}: {reason}")
    return not reason


def _reason(function: str, tensors: Sequence[Tensor]) -> str:
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
        _loaded.append(_load_operators())
    return _loaded[0]


def _load_operators() -> str:
    try:
        build.load_cuda()
    except build.BuildError as error:
        if os.environ.get("PSEUDOSEG_BACKEND") != "eager":
            logger.warning("running without native CUDA kernels: %s", error)
        return str(error)
    register()
    return ""
