"""Convolve each channel with a filter of its own, on maps whose channels lie together.

cuDNN has no fast code for such filters with dilation: in half precision and channels-last an ASPP layer of 2,048
channels takes 1.6 ms on an H200, forward and backward, for 0.2 GB that must move (bench/results/gpu).

A program owns some pixels and some channels of the result and reads the input once for every tap; all but the first of
these reads hit a cache. The gradient of the input is the same convolution with the filter turned, that of the filter is
summed over runs of pixels, whose sums are then added up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, Launch, Plan

# Of 8 tiles on an H200 (bench/depthwise_configs.py, bench/results/gpu/depthwise.json) the first is fastest in nearly
# all layers; of 32 the second is what all were timed with, where others are up to a quarter faster in one.
CONVOLVE = Config(rows=16, columns=128, warps=4, stages=1)
"""Pixels and channels of a program."""
FILTER = Config(rows=32, columns=64, warps=4, stages=1)
"""Pixels at a time and channels of a program of the gradient of the filter."""
RUN = 256
"""About how many pixels it sums."""


class Axis(NamedTuple):
    """Rows or columns: pixels of input and result, taps of the filter, and where these meet."""

    source: int
    target: int
    taps: int
    stride: int
    padding: int
    dilation: int


def axes(input: Tensor, weight: Tensor, *geometry: Sequence[int]) -> tuple[Axis, Axis]:
    """Return rows and columns of a convolution.

    Args:
        input: [B, H, W, C].
        weight: [C, 1, height, width].
        geometry: stride, padding and dilation, of rows and columns each.
    """

    def axis(i: int) -> Axis:
        source, taps = input.shape[1 + i], weight.shape[2 + i]
        stride, padding, dilation = (values[i] for values in geometry)
        target = (source + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        # A stride that takes no step says nothing, however wide it is.
        return Axis(source, target, taps, stride if target > 1 else 1, padding, dilation)

    return axis(0), axis(1)


@triton.jit
def _source(o_target, tap, source, stride, padding, dilation, TURNED: tl.constexpr):
    """Return where a tap meets the source for pixels of the target, and whether it does."""
    if TURNED:  # the target is the input of the convolution, and the source its result
        o_spread = o_target + padding - tap * dilation
        o_source = o_spread // stride
        return o_source, (o_spread >= 0) & (o_source < source) & (o_source * stride == o_spread)
    o_source = o_target * stride - padding + tap * dilation
    return o_source, (o_source >= 0) & (o_source < source)


@triton.jit
def _convolve_kernel(
    input,  # [B, source height, source width, C]
    weight,  # [C, KH, KW]
    bias,  # [C] or None
    output,  # [B, height, width, C], written
    channels,
    height,
    width,
    source_height,
    source_width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    TURNED: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, BC)
    pixel_blocks = tl.cdiv(height * width, BP)
    o_c = tl.program_id(0) % channel_blocks * BC + tl.arange(0, BC)
    i_block = tl.program_id(0) // channel_blocks
    i_image = (i_block // pixel_blocks).to(tl.int64)
    o_pixel = i_block % pixel_blocks * BP + tl.arange(0, BP)
    o_y = o_pixel // width
    o_x = o_pixel % width
    in_c = o_c < channels
    inside = (o_y < height)[:, None] & in_c[None, :]

    p_input = input + i_image * source_height * source_width * channels + o_c[None, :]
    total = tl.zeros((BP, BC), tl.float32)
    for ky in range(KH):
        y, in_y = _source(o_y, ky, source_height, stride_y, padding_y, dilation_y, TURNED)
        for kx in tl.static_range(KW):
            x, in_x = _source(o_x, kx, source_width, stride_x, padding_x, dilation_x, TURNED)
            offset = (y.to(tl.int64) * source_width + x) * channels
            value = tl.load(p_input + offset[:, None], mask=(in_y & in_x)[:, None] & inside, other=0.0)
            tap = tl.load(weight + o_c.to(tl.int64) * (KH * KW) + ky * KW + kx, mask=in_c, other=0.0)
            total += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + o_c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    p_output = output + (i_image * height * width + o_pixel)[:, None] * channels + o_c[None, :]
    tl.store(p_output, total.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _filter_kernel(
    upstream,  # [B, height, width, C]
    input,  # [B, source height, source width, C]
    partial,  # [B runs, KH KW, C] float32, written
    channels,
    runs,  # of an image
    run,  # its pixels, a multiple of BP
    height,
    width,
    source_height,
    source_width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    channel_blocks = tl.cdiv(channels, BC)
    o_c = tl.program_id(0) % channel_blocks * BC + tl.arange(0, BC)
    i_run = (tl.program_id(0) // channel_blocks).to(tl.int64)
    i_image = i_run // runs
    first = (i_run % runs).to(tl.int32) * run
    in_c = (o_c < channels)[None, :]
    p_input = input + i_image * source_height * source_width * channels + o_c[None, :]
    p_upstream = upstream + i_image * height * width * channels + o_c[None, :]
    for tap in range(KH * KW):
        total = tl.zeros((BP, BC), tl.float32)
        for start in tl.range(0, run, BP, loop_unroll_factor=2):
            o_pixel = first + start + tl.arange(0, BP)
            o_y = o_pixel // width
            o_x = o_pixel % width
            y, in_y = _source(o_y, tap // KW, source_height, stride_y, padding_y, dilation_y, False)
            x, in_x = _source(o_x, tap % KW, source_width, stride_x, padding_x, dilation_x, False)
            meets = (in_y & in_x & (o_y < height))[:, None] & in_c
            offset = (y.to(tl.int64) * source_width + x) * channels
            value = tl.load(p_input + offset[:, None], mask=meets, other=0.0)
            offset = o_pixel.to(tl.int64) * channels
            above = tl.load(p_upstream + offset[:, None], mask=meets, other=0.0)
            total += value.to(tl.float32) * above.to(tl.float32)
        p_partial = partial + (i_run * (KH * KW) + tap) * channels + o_c
        tl.store(p_partial, tl.sum(total, 0), mask=o_c < channels)


def plan(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Plan:
    """Plan the convolution of [B, H, W, C] with [C, 1, height, width]; the result is [B, H', W', C]."""
    rows, columns = axes(input, weight, stride, padding, dilation)
    output = input.new_empty((len(input), rows.target, columns.target, input.shape[3]))
    return Plan((output,), [_convolve(input, weight, bias, output, rows, columns, turned=False)])


def plan_backward(
    upstream: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    of_input: bool,
    of_weight: bool,
) -> Plan:
    """Plan the gradients: that of input, and sums [runs, height width, C] which add up to that of weight.

    Both are empty where they are not wanted.
    """
    rows, columns = axes(input, weight, stride, padding, dilation)
    channels = input.shape[3]
    gradient = input.new_empty(input.shape if of_input else (0,))
    pixels = rows.target * columns.target
    runs = triton.cdiv(pixels, RUN)
    run = triton.cdiv(triton.cdiv(pixels, runs), FILTER.rows) * FILTER.rows
    sums = len(input) * runs if of_weight else 0
    partial = input.new_empty((sums, rows.taps * columns.taps, channels), dtype=torch.float32)
    launches = []
    if of_input:
        launches.append(_convolve(upstream, weight, None, gradient, rows, columns, turned=True))
    if of_weight:
        launches.append(
            Launch(
                _filter_kernel,
                sums * triton.cdiv(channels, FILTER.columns),
                {
                    **{"upstream": upstream.contiguous(), "input": input.contiguous(), "partial": partial},
                    **{"channels": channels, "runs": runs, "run": run},
                    **_geometry(rows, columns),
                },
                {
                    **{"KH": rows.taps, "KW": columns.taps},
                    **{"BP": FILTER.rows, "BC": FILTER.columns},
                },
                FILTER,
            )
        )
    return Plan((gradient, partial), launches)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output: Tensor,
    rows: Axis,
    columns: Axis,
    turned: bool,
) -> Launch:
    """Return the launch that writes ``output``; ``turned`` makes it the gradient of what these axes convolve."""
    images, height, width, channels = output.shape
    programs = images * triton.cdiv(height * width, CONVOLVE.rows) * triton.cdiv(channels, CONVOLVE.columns)
    geometry = _geometry(rows, columns)
    if turned:
        geometry |= {"height": height, "width": width}
        geometry |= {"source_height": rows.target, "source_width": columns.target}
    return Launch(
        _convolve_kernel,
        programs,
        {
            **{"input": input.contiguous(), "weight": weight.contiguous(), "output": output},
            **{"bias": None if bias is None else bias.contiguous(), "channels": channels},
            **geometry,
        },
        {
            **{"KH": rows.taps, "KW": columns.taps, "TURNED": turned},
            **{"BP": CONVOLVE.rows, "BC": CONVOLVE.columns},
        },
        CONVOLVE,
    )


def _geometry(rows: Axis, columns: Axis) -> dict[str, int]:
    """Return the arguments of a kernel that describe a convolution."""
    return {
        **{"height": rows.target, "width": columns.target},
        **{"source_height": rows.source, "source_width": columns.source},
        **{"stride_y": rows.stride, "stride_x": columns.stride},
        **{"padding_y": rows.padding, "padding_x": columns.padding},
        **{"dilation_y": rows.dilation, "dilation_x": columns.dilation},
    }
