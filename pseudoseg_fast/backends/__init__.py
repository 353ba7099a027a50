"""Choose which implementation of a public function runs.

Each backend is a module with ``refusal(function, tensors)``, which returns why it cannot run a public function on some
tensors or an empty string, and a function of the same name and signature as in ``pseudoseg_fast.reference`` for
everything that it can run. Upon a refusal the automatic choice moves on, and a forced backend raises it. A module may
also have ``slowness(function, tensors)``, which returns by what measurement a later backend is faster there, upon
which the automatic choice moves on, too, or an empty string.
"""

import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pseudoseg_fast.backends import cpp, cuda, eager, triton

logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpp": cpp, "eager": eager}
"""Backends by name, in the order in which ``"auto"`` tries them."""


def choose(function: str, tensors: Sequence[Tensor | None], backend: str = "auto") -> Callable[..., Tensor]:
    """Return the implementation of a public function for these arguments.

    Args:
        function: name of the public function.
        tensors: its tensor arguments; None stands for one not given.
        backend: a name in ``BACKENDS``, or ``"auto"`` for the first without an ``objection``; that choice is logged at
            DEBUG.

    Raises:
        ValueError: no backend has this name.
        RuntimeError: the forced backend cannot run; the message says why.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if backend == "auto":
        name = next(name for name in BACKENDS if not objection(name, function, given))
        if not torch.compiler.is_compiling():
            logger.debug("%s runs on backend %r", function, name)
        return getattr(BACKENDS[name], function)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {backend!r}")
    if reason := refusal(backend, function, given):
        raise RuntimeError(f"backend {backend!r} cannot run {function}: {reason}")
    return getattr(BACKENDS[backend], function)


def objection(name: str, function: str, tensors: Sequence[Tensor]) -> str:
    """Return why ``"auto"`` does not take a backend for a public function on these tensors, or an empty string."""
    slowness = getattr(BACKENDS[name], "slowness", None)
    return refusal(name, function, tensors) or (slowness(function, tensors) if slowness else "")


def refusal(name: str, function: str, tensors: Sequence[Tensor]) -> str:
    """Return why a backend cannot run a public function on these tensors, or an empty string."""
    if name != "eager" and _is_transformed():
        return "it has no derivatives for torch.func and forward mode; use backend='auto' or 'eager'"
    reason: str = BACKENDS[name].refusal(function, tensors)
    return reason


@torch.compiler.assume_constant_result
def _is_transformed() -> bool:
    """Tell whether a transform of torch.func, or forward-mode differentiation, is at work."""
    return bool(torch._C._are_functorch_transforms_active()) or forward_ad._current_level >= 0
