"""Choose which implementation of a public function runs.

Each backend is a module with ``can_run(function, tensors, *, raise_error=False)`` and a function of the same name
and signature as in ``pseudoseg_fast.reference`` for everything that it can run. The same check serves the automatic
choice, which moves on, and a forced backend, which raises the reason.
"""

import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from pseudoseg_fast.backends import cpp, cuda, eager, triton

logger = logging.getLogger(__name__)

BACKENDS: dict[str, ModuleType] = {"cuda": cuda, "triton": triton, "cpp": cpp, "eager": eager}
"""Backends by name, in the order in which ``"auto"`` tries them."""


def choose(function: str, tensors: Sequence[Tensor | None], backend: str = "auto") -> Callable[..., Tensor]:
    """Return the implementation of a public function for these arguments.

    Args:
        function: name of the public function.
        tensors: its tensor arguments; None stands for one not given.
        backend: a name in ``BACKENDS``, or ``"auto"`` for the first that can run; that choice is logged at DEBUG.

    Raises:
        ValueError: no backend has this name.
        TypeError, RuntimeError: the forced backend cannot run; the message says why.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    if backend == "auto":
        name = next(name for name, module in BACKENDS.items() if module.can_run(function, given))
        if not torch.compiler.is_compiling():
            logger.debug("%s runs on backend %r", function, name)
        return getattr(BACKENDS[name], function)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {backend!r}")
    BACKENDS[backend].can_run(function, given, raise_error=True)
    return getattr(BACKENDS[backend], function)
