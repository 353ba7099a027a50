"""Refine class activation maps: ``cam + softmax(query key' * scale) cam``, without the L x L matrix.

A program owns a block of queries and up to 64 channels of cam (32 of float32). It reads the keys and the cam of its
image once and writes its rows of the result once; further channels are further programs, which compute the scores
again. Every image's keys and cam pass L / BM times through L2 and once through memory, so the products bound the time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import attend, load_rows, store_rows
from .launch import Config, Launch, Plan, aligned_rows, operand_dtype, strides, triton_dtype

# Most bytes of query and key, of cam, and most padded channels of query -> configuration. Of 128 channels the fastest
# of bench/attention_configs.py on an H200 (bench/results/gpu/attention.json), up to what spills many registers or needs
# more than 99 KiB of shared memory on other GPUs; of 256 they were not compared. With cam in half precision a single
# stage gave wrong results there by Triton 3.6.
CONFIGS = {
    (2, 2, 128): Config(rows=128, columns=64, depth=128, warps=8, stages=3),
    (2, 2, 256): Config(rows=64, columns=32, depth=256, warps=4, stages=2),
    (2, 4, 128): Config(rows=64, columns=64, depth=128, warps=4, stages=1),
    (4, 4, 128): Config(rows=64, columns=32, depth=32, warps=4, stages=1),
    (4, 4, 256): Config(rows=64, columns=32, depth=32, warps=4, stages=1),
}


@triton.jit
def _refine_cam_kernel(
    query,  # [B, L, D]
    key,  # [B, L, D]
    cam,  # [B, L, K]
    mask,  # [B, L] or None
    refined,  # [B, L, K]
    attended,  # [B, L, K] float32 or None
    log_total,  # [B, L] float32 or None
    length,
    depth,
    channels,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    SCORE_OPERAND: tl.constexpr,
    VALUE_OPERAND: tl.constexpr,
):
    blocks = tl.cdiv(length, BM)
    groups = tl.cdiv(channels, BK)
    i_block = tl.program_id(0) % blocks
    i_group = tl.program_id(0) // blocks % groups
    i_image = (tl.program_id(0) // blocks // groups).to(tl.int64)
    o_queries = i_block * BM + tl.arange(0, BM)
    first_channel = i_group * BK
    p_cam = cam + i_image * cam_stride_b
    mean, log_sum = attend(
        query + i_image * query_stride_b,
        key + i_image * key_stride_b,
        p_cam,
        mask if mask is None else mask + i_image * mask_stride_b,
        o_queries,
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
        first_channel,
        BM,
        BN,
        BD,
        BS,
        BK,
        SCORE_OPERAND,
        VALUE_OPERAND,
    )
    own = load_rows(p_cam, o_queries, length, channels, cam_stride_l, cam_stride_k, first_channel, BK)
    p_refined = refined + i_image * length * channels
    store_rows(
        p_refined, own.to(tl.float32) + mean, o_queries, length, channels, channels, 1, first_channel, BK
    )
    if attended is not None:
        p_attended = attended + i_image * length * channels
        store_rows(p_attended, mean, o_queries, length, channels, channels, 1, first_channel, BK)
        if i_group == 0:
            tl.store(log_total + i_image * length + o_queries, log_sum, mask=o_queries < length)


def plan(
    query: Tensor,
    key: Tensor,
    cam: Tensor,
    mask: Tensor | None,
    scale: float,
    keep: bool,
    dtype: torch.dtype | None = None,
) -> Plan:
    """Plan one launch; the results are (refined, attended, log_total), the last two empty unless ``keep``.

    ``keep`` keeps what backward needs: ``softmax(..) cam`` [B, L, K] and the log-sum-exp of the scores [B, L], in
    units of log2, both float32. The first is kept apart from the result because a half-precision result is too coarse
    for the gradient. ``dtype`` is that of the refined maps; None for that of cam.
    """
    query, key = aligned_rows(query, key)
    images, length, channels = cam.shape
    refined = cam.new_empty((images, length, channels), dtype=dtype)
    kept = (images, length) if keep else (0,)
    attended = cam.new_empty((*kept, channels) if keep else (0,), dtype=torch.float32)
    log_total = cam.new_empty(kept, dtype=torch.float32)
    tile, constants = tiles(query, key, cam, CONFIGS, most_channels(cam))
    arguments = {
        "query": query,
        "key": key,
        "cam": cam,
        "mask": mask,
        "refined": refined,
        "attended": attended if keep else None,
        "log_total": log_total if keep else None,
    } | scalars(query, key, cam, mask, scale)
    programs = images * triton.cdiv(length, tile.rows) * triton.cdiv(channels, constants["BK"])
    launch = Launch(_refine_cam_kernel, programs, arguments, constants, tile)
    return Plan((refined, attended, log_total), [launch])


def most_channels(cam: Tensor) -> int:
    """Return how many channels of cam a program takes: float32 takes twice the registers."""
    return 64 if cam.itemsize == 2 else 32


def tiles(
    query: Tensor,
    key: Tensor,
    cam: Tensor,
    table: dict[tuple[int, int, int], Config],
    channels: int,
) -> tuple[Config, dict]:
    """Return the configuration of an attention kernel and its constants, with so many channels of cam at a time."""
    scores = operand_dtype(query, key)
    padded = max(16, triton.next_power_of_2(query.shape[2]))
    needed = (scores.itemsize, cam.itemsize, padded)
    tile = next(
        config
        for limits, config in table.items()
        if all(size <= limit for size, limit in zip(needed, limits, strict=True))
    )
    return tile, {
        "BM": tile.rows,
        "BN": tile.columns,
        "BD": padded,
        "BS": min(padded, tile.depth),
        "BK": min(channels, max(16, triton.next_power_of_2(cam.shape[2]))),
        "SCORE_OPERAND": triton_dtype(scores),
        "VALUE_OPERAND": triton_dtype(cam.dtype),
    }


def scalars(query: Tensor, key: Tensor, cam: Tensor, mask: Tensor | None, scale: float) -> dict:
    """Return sizes, scale and strides under the names that the attention kernels share."""
    mask_strides = {"mask_stride_b": 0, "mask_stride_l": 0}
    return {
        "length": query.shape[1],
        "depth": query.shape[2],
        "channels": cam.shape[2],
        "scale": scale,
        **strides(query, "query_stride_b", "query_stride_l", "query_stride_d"),
        **strides(key, "key_stride_b", "key_stride_l", "key_stride_d"),
        **strides(cam, "cam_stride_b", "cam_stride_l", "cam_stride_k"),
        **(mask_strides if mask is None else strides(mask, *mask_strides)),
    }
