"""Convolve single channels with the kernels of this package where a network runs on the CPU."""

import torch
from torch import Tensor, nn

from pseudoseg_fast import functional


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel with a filter of its own; PyTorch's under autocast and for what is no CPU batch."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if input.device.type != "cpu" or input.dim() != 4 or torch.is_autocast_enabled("cpu"):
            return super()._conv_forward(input, weight, bias)
        assert not isinstance(self.padding, str)
        return functional.depthwise_conv2d(
            input, weight, bias, stride=self.stride, padding=self.padding, dilation=self.dilation
        )


def use_depthwise_kernels(network: nn.Module) -> int:
    """Let ``functional.depthwise_conv2d`` compute the depthwise convolutions of a network that it is faster at.

    Those have dilation or filters wider than 3; for others PyTorch has fast code (bench/bench_depthwise.py). Weights,
    names and hooks stay as they are. Left alone are also convolutions of other classes, such as timm's that pad by the
    size of their input, and those whose padding is not zeros of a fixed width.

    Returns:
        How many there are.
    """
    found = [
        module
        for module in network.modules()
        if type(module) is nn.Conv2d
        and 1 < module.groups == module.in_channels == module.out_channels
        and (max(module.dilation) > 1 or max(module.kernel_size) > 3)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ]
    for module in found:
        module.__class__ = DepthwiseConv2d
    return len(found)
