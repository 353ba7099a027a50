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
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import attend, load_rows, product
from .batch_norm import store_block_statistics
from .fuse_predictions import launch as fusion
from .launch import Config, Launch, Plan, configuration, operand_dtype, strides, triton_dtype
from .logit_scale import BatchNorm
from .logit_scale import launch as square_sums
from .refine_cam_forward import scalars

# Bytes of a padded row of query or of float32 value channels, whichever is more -> configuration. Chosen by reasoning
# and by what compiles without spills in 99 KiB of shared memory; no GPU has measured them.
CONFIGS = {
    256: Config(rows=64, columns=64, warps=4, stages=2),
    512: Config(rows=64, columns=32, warps=8, stages=2),
    1024: Config(rows=32, columns=32, warps=8, stages=1),
}
MAX_CHANNELS = 256


@triton.jit
def _project_kernel(
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
            weight = tl.load(
                projection + o_class.to(tl.int64) * projection_stride_out, mask=o_class < classes, other=0.0
            )
            logits = background[:, None] * weight.to(tl.float32)[None, :]
        logits = product(refined, weights, logits, tl.float32)
        offsets = (i_image * classes + o_class)[None, :] * length + o_position[:, None]
        inside = (o_class < classes)[None, :] & (o_position < length)[:, None]
        tl.store(projected + offsets, logits, mask=inside)
        p_block = blocks + tl.program_id(0).to(tl.int64) * 2 * classes
        store_block_statistics(p_block, logits, o_position, length, o_class, classes)


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
    """Plan the 3 launches; the result is the label [B, C, H, W].

    Beside it they write the projected logits [B, C, h2 w2] and a few numbers for each block of positions.
    """
    images, classes = decoder.shape[:2]
    rows = cam.flatten(2).mT  # [B, L, K]; a view unless h2 and w2 cannot be one dimension
    channels, length = cam.shape[1], rows.shape[1]
    scores = operand_dtype(query, key)
    padded_depth, padded_channels = (max(16, triton.next_power_of_2(n)) for n in (query.shape[2], channels))
    tile = configuration(CONFIGS, max(padded_depth * scores.itemsize, padded_channels * 4))
    count = images * triton.cdiv(length, tile.rows)
    projected = torch.empty((images, classes, length), dtype=torch.float32, device=cam.device)
    blocks = torch.empty((count, 2, classes), dtype=torch.float32, device=cam.device)
    arguments = {
        "query": query,
        "key": key,
        "cam": rows,
        "mask": mask,
        "projection": projection,
        "projected": projected,
        "blocks": blocks,
        "classes": classes,
        **scalars(query, key, rows, mask, query.shape[2] ** -0.5),
        **strides(projection, "projection_stride_out", "projection_stride_in"),
    }
    constants = {
        "BACKGROUND": int(background),
        "BM": tile.rows,
        "BN": tile.columns,
        "BD": padded_depth,
        "BK": padded_channels,
        "BC": 32,
        "SCORE_OPERAND": triton_dtype(scores),
        "VALUE_OPERAND": triton_dtype(cam.dtype),
    }
    launches = [Launch(_project_kernel, count, arguments, constants, tile)]

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
