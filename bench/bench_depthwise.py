"""Time forward and backward of depthwise convolutions: oneDNN through eager and torch.compile, and our kernels.

python -m pytest bench/bench_depthwise.py --threads 2 --benchmark-json bench/results/depthwise_cpu.json
The layers are those of the networks of README, in channels_last; each result is first checked against eager.
"""

from typing import Any, NamedTuple

import pytest
import torch

from bench.bench_functional import Arguments, compare, implementation_of


class Layer(NamedTuple):
    """A depthwise convolution of stride 1 whose result is as large as its input."""

    images: int
    channels: int
    side: int
    taps: int
    dilation: int


LAYERS = {
    "lite0 5x5, dilation 2": Layer(8, 1152, 8, 5, 2),
    "lite0 3x3, dilation 2": Layer(8, 1152, 8, 3, 2),
    "lite0 5x5": Layer(8, 672, 8, 5, 1),
    "lite0 3x3": Layer(8, 144, 32, 3, 1),
    "lite0 ASPP, dilation 12": Layer(8, 320, 8, 3, 12),
    "decoder 3x3": Layer(8, 176, 32, 3, 1),
    "ResNet ASPP, dilation 12": Layer(4, 2048, 33, 3, 12),
    "few channels, large map": Layer(4, 32, 128, 3, 1),
    "odd channels, large map": Layer(4, 17, 128, 3, 1),
}


def arguments(layer: Layer) -> Arguments:
    """Return the arguments of a layer."""
    input = torch.randn(layer.images, layer.channels, layer.side, layer.side)
    input = input.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(layer.channels, 1, layer.taps, layer.taps, requires_grad=True)
    padding = layer.dilation * (layer.taps - 1) // 2
    return (input, weight), {"padding": (padding, padding), "dilation": (layer.dilation, layer.dilation)}


@pytest.mark.parametrize("implementation", ["eager", "compile", "native"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(benchmark: Any, device: str, layer: str, implementation: str) -> None:
    """Check one implementation against eager, measure its memory, then time it."""
    if device != "cpu":
        pytest.skip("the kernels are for the CPU; on a GPU PyTorch convolves")
    torch.manual_seed(0)
    torch.compiler.reset()
    benchmark.extra_info.update(size=layer, shape=LAYERS[layer]._asdict())
    chosen = implementation_of("depthwise_conv2d", implementation, device)
    compare(benchmark, device, "depthwise_conv2d", implementation, chosen, [arguments(LAYERS[layer])])
