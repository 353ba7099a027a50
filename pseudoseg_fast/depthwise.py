"""Convolve single channels with the kernels of this package where a network has slow ones."""

import math

import torch
from torch import Tensor, nn

from pseudoseg_fast import functional


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel with a filter of its own; PyTorch's for what is no batch and, on the CPU, autocast.

    Under autocast on a GPU it casts what PyTorch's would.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = input.device.type
        amp = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
        if device not in ("cpu", "cuda") or input.dim() != 4 or (amp and device == "cpu"):
            return super()._conv_forward(input, weight, bias)
        if amp:
            input, weight = _cast(input), _cast(weight)
            bias = None if bias is None else _cast(bias)
        assert not isinstance(self.padding, str)
        return functional.depthwise_conv2d(
            input, weight, bias, stride=self.stride, padding=self.padding, dilation=self.dilation
        )


def _cast(tensor: Tensor) -> Tensor:
    """Return a tensor as autocast would give it to a convolution; float64 it leaves alone."""
    if tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def use_depthwise_kernels(network: nn.Module, device: torch.device) -> int:
    """Let ``functional.depthwise_conv2d`` compute the depthwise convolutions of a network that it is faster at.

    Those have dilation or, on the CPU, filters wider than 3; for others PyTorch has fast code
    (bench/bench_depthwise.py). Weights, names and hooks stay as they are. Left alone are also convolutions of other
    classes, such as timm's that pad by the size of their input, and those whose padding is not zeros of a fixed width.

    Args:
        network: in which they are.
        device: where it will run.

    Returns:
        How many there are.
    """
    widest = 3 if device.type == "cpu" else math.inf
    found = [
        module
        for module in network.modules()
        if type(module) is nn.Conv2d
        and 1 < module.groups == module.in_channels == module.out_channels
        and (max(module.dilation) > 1 or max(module.kernel_size) > widest)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ]
    for module in found:
        module.__class__ = DepthwiseConv2d
    return len(found)
