"""Bilinear upsampling inside a kernel, with the meaning of ``interpolate``, and its 9-point form W'W."""

import triton
import triton.language as tl

from pseudoseg_fast.reference import LOWEST_LOGIT

_LOWEST_LOGIT = tl.constexpr(LOWEST_LOGIT)


def axis_scale(source: int, target: int, align_corners: bool) -> float:
    """Return the distance of two target points of one axis in steps of the source."""
    if align_corners:
        return (source - 1) / (target - 1) if target > 1 else 0.0
    return source / target


def targets_per_node(source: int, target: int, align_corners: bool) -> int:
    """Return how many target points of one axis, from the first on, may lie within one step of a source node."""
    scale = axis_scale(source, target, align_corners)
    return min(target, int(2 / scale) + 6) if scale else target


@triton.jit
def source_position(o_target, scale, source, ALIGN_CORNERS: tl.constexpr):
    """Return where target points of one axis lie in the source, within [0, source - 1]."""
    position = o_target.to(tl.float32) * scale
    if not ALIGN_CORNERS:
        position = (o_target.to(tl.float32) + 0.5) * scale - 0.5
    return tl.minimum(tl.maximum(position, 0.0), source - 1.0)


@triton.jit
def bands(
    o_node,
    source,
    target,
    scale,
    reach,
    ALIGN_CORNERS: tl.constexpr,
    BT: tl.constexpr,
):
    """Return the diagonal and the first off-diagonal of W'W at source nodes of one axis.

    ``reach`` bounds the target points that touch a node; they are summed BT at a time.
    """
    first = o_node.to(tl.float32) * 0.0
    if scale > 0.0:
        shift = 0.0 if ALIGN_CORNERS else 0.5
        first = (o_node - 1 + shift) / scale - shift
    o_first = tl.maximum(tl.floor(first).to(tl.int32) - 1, 0)
    diagonal = tl.zeros(o_node.shape, tl.float32)
    beside = tl.zeros(o_node.shape, tl.float32)
    for start in range(0, reach, BT):
        o_step = start + tl.arange(0, BT)
        o_target = o_first[None, :] + o_step[:, None]  # [BT, nodes]
        position = source_position(o_target, scale, source, ALIGN_CORNERS)
        inside = (o_target < target) & (o_step < reach)[:, None]
        here = tl.maximum(1.0 - tl.abs(position - o_node[None, :]), 0.0)
        there = tl.maximum(1.0 - tl.abs(position - (o_node[None, :] + 1)), 0.0)
        here = tl.where(inside, here, 0.0)
        diagonal += tl.sum(here * here, 0)
        beside += tl.sum(here * there, 0)
    return diagonal, beside


@triton.jit
def _corner(p_map, o_class, inside, offset):
    logit = tl.load(p_map + o_class[:, None] + offset[None, :], mask=inside, other=0.0).to(tl.float32)
    return tl.where(logit < _LOWEST_LOGIT, _LOWEST_LOGIT, logit)  # a NaN stays


@triton.jit
def upsampled(
    p_map,
    o_class,
    inside,
    o_y,
    o_x,
    height,
    width,
    scale_y,
    scale_x,
    stride_c,
    stride_h,
    stride_w,
    ALIGN_CORNERS: tl.constexpr,
):
    """Return a map [classes, pixels] at target pixels; ``inside`` broadcasts to that, and zero stands elsewhere.

    Every pixel reads its 4 corners from the first cache: neighbours share them, so little is read from further away.
    """
    y = source_position(o_y, scale_y, height, ALIGN_CORNERS)
    x = source_position(o_x, scale_x, width, ALIGN_CORNERS)
    o_top = y.to(tl.int32)
    o_left = x.to(tl.int32)
    below = y - o_top
    right = x - o_left
    top = o_top.to(tl.int64) * stride_h
    bottom = tl.minimum(o_top + 1, height - 1).to(tl.int64) * stride_h
    left = o_left.to(tl.int64) * stride_w
    other = tl.minimum(o_left + 1, width - 1).to(tl.int64) * stride_w
    o_class = o_class.to(tl.int64) * stride_c
    upper = _corner(p_map, o_class, inside, top + left) * (1.0 - right)[None, :]
    upper += _corner(p_map, o_class, inside, top + other) * right[None, :]
    lower = _corner(p_map, o_class, inside, bottom + left) * (1.0 - right)[None, :]
    lower += _corner(p_map, o_class, inside, bottom + other) * right[None, :]
    return upper * (1.0 - below)[None, :] + lower * below[None, :]
