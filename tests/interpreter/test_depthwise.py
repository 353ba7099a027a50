"""depthwise_conv2d of the Triton kernels against PyTorch's in float64."""

import pytest
import torch
from comparison import FLOATS
from convolving import CASES, check, check_wanted, draw, with_gradients

from pseudoseg_fast import functional
from pseudoseg_fast.backends.triton import _part

LARGE = ("more taps than are unrolled", "bands of rows")  # for the interpreter


@pytest.mark.parametrize("case", [case for case in CASES if case not in LARGE])
def test_values_and_gradients(case):
    check(*CASES[case], torch.float32, backend="triton")


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_half_precision(dtype):
    check(*CASES["taps that never meet the map"], dtype, backend="triton")


def test_several_runs_of_pixels_and_blocks_of_channels(monkeypatch):
    one = torch.ones(1, 1, 1, 1)
    functional.depthwise_conv2d(one, one, backend="triton")  # imports the kernels
    monkeypatch.setattr(_part("depthwise"), "RUN", 32)
    check((1, 150, 7, 9), (3, 1), {"padding": (3, 0), "dilation": (3, 1)}, torch.float32, backend="triton")


def test_gradients_that_nobody_wants_are_not_made():
    check_wanted("triton")


def test_maps_whose_channels_lie_apart():
    tensors = draw((2, 5, 7, 6), (3, 3), torch.float32)
    apart = [tensors[0].detach().contiguous().requires_grad_(), *tensors[1:]]
    results = [
        with_gradients(lambda *given: functional.depthwise_conv2d(*given, backend="triton"), given)
        for given in (tensors, apart)
    ]
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
