"""Operators that convolve single channels, on maps [B, H, W, C]: what the C++ and the Triton backend share."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pseudoseg_fast.backends.derivatives import no_second_derivative

SCHEMAS = {
    "depthwise_conv2d": (
        "(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, int[] dilation) -> Tensor"
    ),
    "depthwise_conv2d_backward": (
        "(Tensor upstream, Tensor input, Tensor weight, int[] stride, int[] padding, int[] dilation, bool of_input, "
        "bool of_weight) -> (Tensor, Tensor)"
    ),
}
"""As csrc/ops_depthwise.cpp defines them, too; a gradient that is not wanted is empty."""


def depthwise_conv2d(
    namespace: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """See ``functional.depthwise_conv2d``; ``namespace`` is that of the operators."""
    operator = getattr(torch.ops, namespace).depthwise_conv2d
    last = input.permute(0, 2, 3, 1)
    output: Tensor = operator(last, weight, bias, list(stride), list(padding), list(dilation))
    return output.permute(0, 3, 1, 2)


def register(namespace: str) -> None:
    """Give the operators of a namespace shapes and derivatives."""
    torch.library.register_fake(f"{namespace}::depthwise_conv2d", _fake)
    torch.library.register_fake(f"{namespace}::depthwise_conv2d_backward", _fake_backward)
    torch.library.register_autograd(
        f"{namespace}::depthwise_conv2d", partial(_backward, namespace), setup_context=_save
    )
    torch.library.register_autograd(
        f"{namespace}::depthwise_conv2d_backward", partial(no_second_derivative, "depthwise_conv2d")
    )


def _fake(
    input: Tensor,
    weight: Tensor,
    _: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    sides = [
        (input.shape[1 + i] + 2 * padding[i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    ]
    return input.new_empty((input.shape[0], *sides, input.shape[3]))


def _fake_backward(_: Tensor, input: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    of_input, of_weight = arguments[-2:]
    return input.new_empty(input.shape if of_input else (0,)), weight.new_empty(
        weight.shape if of_weight else (0,)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, _, *ctx.geometry = inputs
    ctx.save_for_backward(input, weight)


def _backward(namespace: str, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    of_input, of_weight, of_bias = ctx.needs_input_grad[:3]
    to_input, to_weight = getattr(torch.ops, namespace).depthwise_conv2d_backward(
        grad, input, weight, *ctx.geometry, of_input, of_weight
    )
    if of_weight and weight.is_contiguous(memory_format=torch.channels_last):
        # A filter of one input channel lies alike in both memory formats; DistributedDataParallel wants equal strides.
        to_weight = to_weight.as_strided(weight.shape, weight.stride())
    return (
        to_input if of_input else None,
        to_weight if of_weight else None,
        grad.sum((0, 1, 2)) if of_bias else None,
        None,
        None,
        None,
    )
