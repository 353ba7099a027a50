"""Run the losses, fusion and prediction on the CPU with the C++ kernels of csrc, without any full-size map."""

import logging
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pseudoseg_fast import build
from pseudoseg_fast.backends.native import (
    consistency_loss,
    cross_entropy,
    fuse_predictions,
    predict_labels,
    register,
    soft_cross_entropy,
)

__all__ = [
    "FUNCTIONS",
    "can_run",
    "consistency_loss",
    "cross_entropy",
    "fuse_predictions",
    "predict_labels",
    "soft_cross_entropy",
]

logger = logging.getLogger(__name__)

FUNCTIONS = (
    "consistency_loss",
    "cross_entropy",
    "fuse_predictions",
    "predict_labels",
    "soft_cross_entropy",
)


def can_run(function: str, tensors: Sequence[Tensor], *, raise_error: bool = False) -> bool:
    """Tell whether the kernels can run a public function on these tensors; build them at the first question.

    Raises:
        RuntimeError: with ``raise_error``, why they cannot.
    """
    reason = _reason(function, tensors)
    if reason and raise_error:
        raise RuntimeError(f"backend 'cpp' cannot run {function}: {reason}")
    return not reason


def _reason(function: str, tensors: Sequence[Tensor]) -> str:
    if function not in FUNCTIONS:
        return f"it has kernels for {', '.join(FUNCTIONS)}; use backend='eager'"
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it needs CPU tensors, got one on {tensor.device}; use backend='auto'"
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
        build.load_cpu()
    except build.BuildError as error:
        if os.environ.get("PSEUDOSEG_BACKEND") != "eager":
            logger.warning("running without native CPU kernels: %s", error)
        return str(error)
    register()
    return ""
