"""What derivatives of all operators have in common."""

from typing import Any

from torch import Tensor


def no_second_derivative(function: str, ctx: Any, *_: Tensor) -> None:
    """Stand for the derivative of a backward pass; raises RuntimeError."""
    raise RuntimeError(f"the kernels of {function} have no second derivative; use backend='eager'")
