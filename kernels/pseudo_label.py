"""Make the pseudo label from features, class activation maps and decoder logits in three launches.

Two reductions over the batch stand between the features and the label, and nothing after one of them can start before
all of it is done, so each is a boundary between launches:

1. attention, background channel and projection, a block of positions to a program: refined maps stay in registers, the
   projected logits [B, C, h2 w2] are written once, with the statistics of every block;
   -- the statistics of the batch norm are complete --
2. ``logit_scale``: combine them, and sum the squares of both maps by the 9-point stencil;
   -- the norm of the fusion is complete --
3. ``fuse_predictions`` with the batch norm applied to the upsampled projection.

The norms ``"pixel"`` and ``"none"`` need only the first boundary. They still take three launches: a handful of programs
combine the statistics, which would otherwise be read whole by every program of the fusion.

Above 32 channels of cam a block of refined maps does not fit into the registers beside the rest. Then ``refine_cam``
writes them, in float32, and a launch of its own projects them: four in all, after copies of queries and keys whose
channels do not lie together.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import attend, load_rows, product
from .batch_norm import store_block_statistics
from .fuse_predictions import launch as fusion
from .launch import Arguments, Config, Launch, Plan, aligned_rows, dense_rows, strides
from .logit_scale import BatchNorm
from .logit_scale import launch as square_sums
from .refine_cam_forward import plan as refine_cam
from .refine_cam_forward import scalars, tiles

# As in refine_cam_forward.
CONFIGS = {
    (2, 2, 128): Config(rows=128, columns=64, depth=128, warps=8, stages=3),
    (2, 2, 256): Config(rows=64, columns=32, depth=256, warps=8, stages=2),
    (2, 4, 128): Config(rows=64, columns=64, depth=128, warps=4, stages=1),
    (4, 4, 128): Config(rows=64, columns=32, depth=32, warps=4, stages=1),
    (4, 4, 256): Config(rows=64, columns=32, depth=32, warps=4, stages=1),
}
# Of the projection on its own: "columns" are the channels that it multiplies at a time.
PROJECTION = Config(rows=64, columns=32, warps=4, stages=2)
_MOST_CHANNELS = 32  # of cam, whose refined maps stay in registers
_CLASSES = 32
"""Classes that are projected at a time."""


@triton.jit
def _store_logits(projected, blocks, logits, i_image, o_position, length, o_class, classes):
    """Store projected logits [positions, classes] and their statistics over this block."""
    offsets = (i_image * classes + o_class)[None, :] * length + o_position[:, None]
    inside = (o_class < classes)[None, :] & (o_position < length)[:, None]
    tl.store(projected + offsets, logits, mask=inside)
    p_block = blocks + tl.program_id(0).to(tl.int64) * 2 * classes
    store_block_statistics(p_block, logits, o_position, length, o_class, classes)


@triton.jit
def _background_logits(projection, background, o_class, classes, stride_out):
    """Return what the background channel [positions] adds to the logits [positions, classes]."""
    weight = tl.load(projection + o_class.to(tl.int64) * stride_out, mask=o_class < classes, other=0.0)
    return background[:, None] * weight.to(tl.float32)[None, :]


@triton.jit
def _attend_project_kernel(
    query,  # [B, L, D]
    key,  # [B, L, D]
    cam,  # [B, K, L] with strides in the order of [B, L, K]
    mask,  # [B, L] or None
    projection,  # [C, C]
    projected,  # [B, C, L] float32, written
    blocks,  # [B * blocks per image, 2, C] float32, written
    length,
    depth,
    channels,
    classes,
    scale,
    query_stride_b,
    query_stride_l,
    query_stride_d,
    key_stride_b,
    key_stride_l,
    key_stride_d,
    cam_stride_b,
    cam_stride_l,
    cam_stride_k,
    mask_stride_b,
    mask_stride_l,
    projection_stride_out,
    projection_stride_in,
    BACKGROUND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
    SCORE_OPERAND: tl.constexpr,
    VALUE_OPERAND: tl.constexpr,
):
    i_image = (tl.program_id(0) // tl.cdiv(length, BM)).to(tl.int64)
    o_position = tl.program_id(0) % tl.cdiv(length, BM) * BM + tl.arange(0, BM)
    p_cam = cam + i_image * cam_stride_b
    mean, _ = attend(
        query + i_image * query_stride_b,
        key + i_image * key_stride_b,
        p_cam,
        mask if mask is None else mask + i_image * mask_stride_b,
        o_position,
        length,
        depth,
        channels,
        scale,
        query_stride_l,
        query_stride_d,
        key_stride_l,
        key_stride_d,
        cam_stride_l,
        cam_stride_k,
        mask_stride_l,
        0,
        BM,
        BN,
        BD,
        BS,
        BK,
        SCORE_OPERAND,
        VALUE_OPERAND,
    )
    own = load_rows(p_cam, o_position, length, channels, cam_stride_l, cam_stride_k, 0, BK)
    refined = own.to(tl.float32) + mean  # [BM, BK]
    o_channel = tl.arange(0, BK)
    background = 2.0 - tl.max(tl.where((o_channel < channels)[None, :], refined, float("-inf")), 1)
    p_weights = projection + BACKGROUND * projection_stride_in
    for first_class in range(0, classes, BC):
        o_class = first_class + tl.arange(0, BC)
        weights = load_rows(
            p_weights,
            o_channel,
            channels,
            classes,
            projection_stride_in,
            projection_stride_out,
            first_class,
            BC,
        )
        logits = tl.zeros([BM, BC], tl.float32)
        if BACKGROUND:
            logits = _background_logits(projection, background, o_class, classes, projection_stride_out)
        logits = product(refined, weights, logits, tl.float32)
        _store_logits(projected, blocks, logits, i_image, o_position, length, o_class, classes)


@triton.jit
def _project_kernel(
    refined,  # [B, L, K] float32
    projection,  # [C, C]
    projected,  # [B, C, L] float32, written
    blocks,  # [B * blocks per image, 2, C] float32, written
    length,
    channels,
    classes,
    projection_stride_out,
    projection_stride_in,
    BACKGROUND: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BC: tl.constexpr,
):
    i_image = (tl.program_id(0) // tl.cdiv(length, BM)).to(tl.int64)
    o_position = tl.program_id(0) % tl.cdiv(length, BM) * BM + tl.arange(0, BM)
    p_refined = refined + i_image * length * channels
    highest = tl.full([BM], float("-inf"), tl.float32)
    if BACKGROUND:
        for first in range(0, channels, BK):
            part = load_rows(p_refined, o_position, length, channels, channels, 1, first, BK)
            part = tl.where((first + tl.arange(0, BK) < channels)[None, :], part, float("-inf"))
            highest = tl.maximum(highest, tl.max(part, 1))
    p_weights = projection + BACKGROUND * projection_stride_in
    for first_class in range(0, classes, BC):
        o_class = first_class + tl.arange(0, BC)
        logits = tl.zeros([BM, BC], tl.float32)
        if BACKGROUND:
            logits = _background_logits(projection, 2.0 - highest, o_class, classes, projection_stride_out)
        for first in range(0, channels, BK):
            part = load_rows(p_refined, o_position, length, channels, channels, 1, first, BK)
            weights = load_rows(
                p_weights,
                first + tl.arange(0, BK),
                channels,
                classes,
                projection_stride_in,
                projection_stride_out,
                first_class,
                BC,
            )
            logits = product(part, weights, logits, tl.float32)
        _store_logits(projected, blocks, logits, i_image, o_position, length, o_class, classes)


def plan(
    query: Tensor,
    key: Tensor,
    cam: Tensor,
    decoder: Tensor,
    projection: Tensor,
    shift: Tensor,
    background: bool,
    mask: Tensor | None,
    size: tuple[int, int],
    gamma: float,
    temperature: float,
    norm: str,
    align_corners: bool,
) -> Plan:
    """Plan 3 launches, or 4 above 32 channels of cam; the result is the label [B, C, H, W].

    Beside it they write the projected logits [B, C, h2 w2] and a few numbers for each block of positions.
    """
    images, classes = decoder.shape[:2]
    rows = cam.flatten(2).mT  # [B, L, K]; a view unless h2 and w2 cannot be one dimension
    length, scale = rows.shape[1], query.shape[2] ** -0.5
    query, key = aligned_rows(query, key)
    tile, constants = tiles(query, key, rows, CONFIGS, _MOST_CHANNELS)
    fused = rows.shape[2] <= _MOST_CHANNELS
    if not fused:
        tile = PROJECTION
    count = images * triton.cdiv(length, tile.rows)
    projected = torch.empty((images, classes, length), dtype=torch.float32, device=cam.device)
    blocks = torch.empty((count, 2, classes), dtype=torch.float32, device=cam.device)
    arguments: Arguments = {
        "projection": projection,
        "projected": projected,
        "blocks": blocks,
        "classes": classes,
    }
    arguments |= strides(projection, "projection_stride_out", "projection_stride_in")
    projecting = {"BACKGROUND": int(background), "BC": _CLASSES}
    if fused:
        arguments |= {"query": query, "key": key, "cam": rows, "mask": mask}
        arguments |= scalars(query, key, rows, mask, scale)
        launches = [Launch(_attend_project_kernel, count, arguments, constants | projecting, tile)]
    else:
        attention = refine_cam(dense_rows(query), dense_rows(key), rows, mask, scale, False, torch.float32)
        arguments |= {"refined": attention.results[0], "length": length, "channels": rows.shape[2]}
        projecting |= {"BM": tile.rows, "BK": tile.columns}
        launches = [*attention.launches, Launch(_project_kernel, count, arguments, projecting, tile)]

    batch_norm = BatchNorm(blocks, shift, images, length, tile.rows)
    cam_logits = projected.unflatten(2, cam.shape[2:])
    squares = None
    if norm in ("batch", "image"):
        squares, sums = square_sums(decoder, cam_logits, size, align_corners, batch_norm)
        launches.append(sums)
    else:
        launches.append(batch_norm.launch())
    label, fuse = fusion(
        decoder, cam_logits, size, gamma, temperature, norm, align_corners, squares, batch_norm.affine
    )
    return Plan((label,), [*launches, fuse])
