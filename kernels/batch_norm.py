"""Batch statistics of projected maps: partial results of blocks of positions, combined in a fixed order.

A block keeps the mean and the sum of squared deviations of every class, not sums of squares, so that a mean far from
zero costs no accuracy.
"""

import triton
import triton.language as tl

from pseudoseg_fast.reference import BATCH_NORM_EPS

_EPS = tl.constexpr(BATCH_NORM_EPS)


@triton.jit
def store_block_statistics(p_block, values, o_rows, rows, o_class, classes):
    """Store mean and sum of squared deviations over the rows of [rows, classes] to p_block [2, C]."""
    inside = (o_rows < rows)[:, None]
    count = tl.sum((o_rows < rows).to(tl.float32), 0)
    mean = tl.sum(tl.where(inside, values, 0.0), 0) / count
    deviation = tl.where(inside, values - mean[None, :], 0.0)
    tl.store(p_block + o_class, mean, mask=o_class < classes)
    tl.store(p_block + classes + o_class, tl.sum(deviation * deviation, 0), mask=o_class < classes)


@triton.jit
def batch_norm(
    blocks,  # [B * blocks per image, 2, C] float32
    shift,  # [C]
    o_class,
    classes,
    images,
    length,
    shift_stride,
    BLOCK_ROWS: tl.constexpr,
    BP: tl.constexpr,
):
    """Return factor and offset of the batch norm of some classes: ``(x - mean) / std + shift``.

    BLOCK_ROWS positions are in a block, fewer in the last of an image; BP blocks are read at a time.
    """
    per_image = tl.cdiv(length, BLOCK_ROWS)
    count = images * per_image
    total = 1.0 * images * length
    inside = (o_class < classes)[None, :]
    mean = tl.zeros(o_class.shape, tl.float32)
    for first in range(0, count, BP):
        o_block = first + tl.arange(0, BP)
        rows = _rows(o_block, per_image, count, length, BLOCK_ROWS)
        offsets = o_block.to(tl.int64)[:, None] * (2 * classes) + o_class[None, :]
        value = tl.load(blocks + offsets, mask=(o_block < count)[:, None] & inside, other=0.0)
        mean += tl.sum(value * (rows / total)[:, None], 0)
    variance = tl.zeros(o_class.shape, tl.float32)
    for first in range(0, count, BP):
        o_block = first + tl.arange(0, BP)
        rows = _rows(o_block, per_image, count, length, BLOCK_ROWS)
        offsets = o_block.to(tl.int64)[:, None] * (2 * classes) + o_class[None, :]
        read = (o_block < count)[:, None] & inside
        distance = tl.load(blocks + offsets, mask=read, other=0.0) - mean[None, :]
        squares = tl.load(blocks + offsets + classes, mask=read, other=0.0)
        variance += tl.sum(tl.where(read, squares + distance * distance * rows[:, None], 0.0), 0)
    factor = tl.rsqrt(variance / total + _EPS)
    bias = tl.load(shift + o_class.to(tl.int64) * shift_stride, mask=o_class < classes, other=0.0)
    return factor, bias.to(tl.float32) - mean * factor


@triton.jit
def _rows(o_block, per_image, count, length, BLOCK_ROWS: tl.constexpr):
    first = o_block % per_image * BLOCK_ROWS
    return tl.where(o_block < count, tl.minimum(length - first, BLOCK_ROWS), 0).to(tl.float32)
