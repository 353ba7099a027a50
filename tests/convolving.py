"""Depthwise convolutions to be compared with PyTorch's in float64."""

import torch
from torch.nn.functional import conv2d

from pseudoseg_fast import functional

CASES = {
    "plain": ((2, 19, 9, 7), (3, 3), {"padding": (1, 1)}),
    "dilated on a small map": ((1, 16, 8, 8), (5, 5), {"padding": (4, 4), "dilation": (2, 2)}),
    "taps that never meet the map": ((2, 5, 8, 8), (3, 3), {"padding": (12, 12), "dilation": (12, 12)}),
    "strided, each axis its own": ((2, 33, 12, 17), (5, 3), {"stride": (2, 3), "padding": (2, 0)}),
    "stride over dilated taps": ((1, 4, 20, 21), (3, 3), {"stride": (2, 2), "dilation": (3, 1)}),
    "more taps than are unrolled": ((2, 17, 21, 23), (11, 9), {"padding": (5, 4)}),
    "even filter": ((1, 8, 6, 5), (2, 4), {"padding": (1, 2)}),
    "padding beyond the filter": ((1, 8, 6, 6), (3, 3), {"padding": (5, 4)}),
    "one pixel": ((3, 8, 1, 1), (3, 3), {"padding": (1, 1)}),
    "bands of rows": ((1, 40, 90, 41), (3, 3), {"padding": (1, 1), "stride": (2, 1)}),
    "a stride beyond the map": ((2, 8, 5, 6), (3, 3), {"stride": (1, 2**33)}),
    "no picture": ((0, 8, 4, 4), (3, 3), {}),
}


def draw(shape, filter_size, dtype):
    channels = shape[1]
    input = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, *filter_size, dtype=dtype)
    bias = torch.randn(channels, 2, dtype=dtype)[:, 0]  # whose numbers lie apart
    return [tensor.requires_grad_() for tensor in (input, weight, bias)]


def with_gradients(run, tensors, upstream=None):
    """Return result and gradients; ``upstream`` is by default the sine of the result's index."""
    output = run(*tensors)
    return [output, *torch.autograd.grad(output, tensors, sines(output) if upstream is None else upstream)]


def sines(output):
    indices = torch.arange(output.numel(), dtype=torch.float64)
    return indices.sin().to(output).view(output.shape)


def check(shape, filter_size, options, dtype, backend="cpp", device="cpu"):
    """Compare with float64 to within a few roundings of the sum of the terms' magnitudes, and of the least number."""

    def truth_of(tensors, upstream):
        doubles = [tensor.detach().cpu().double().requires_grad_() for tensor in tensors]
        return with_gradients(lambda *given: conv2d(*given, groups=shape[1], **options), doubles, upstream)

    tensors = [tensor.detach().to(device).requires_grad_() for tensor in draw(shape, filter_size, dtype)]
    actual = with_gradients(
        lambda *given: functional.depthwise_conv2d(*given, **options, backend=backend), tensors
    )
    actual = [tensor.cpu() for tensor in actual]
    upstream = sines(actual[0]).double()
    truth = truth_of(tensors, upstream)
    magnitudes = truth_of([tensor.abs() for tensor in tensors], upstream.abs())
    for one, other, magnitude in zip(actual, truth, magnitudes, strict=True):
        assert one.dtype == dtype
        eps, least = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
        roundings = 16 if eps < 1e-6 else 1  # half precision is summed in float32
        assert ((one.double() - other).abs() <= eps * (roundings * magnitude + least)).all()


def check_wanted(backend):
    """See that gradients are made of what needs one, and of nothing else."""
    input, weight, _ = draw((1, 4, 5, 5), (3, 3), torch.float32)
    for wanted in (input, weight):
        for tensor in (input, weight):
            tensor.grad = None
            tensor.requires_grad_(tensor is wanted)
        functional.depthwise_conv2d(input, weight, backend=backend).sum().backward()
        assert [tensor.grad is not None for tensor in (input, weight)] == [
            tensor is wanted for tensor in (input, weight)
        ]
