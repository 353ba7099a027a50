"""The gradient of ``refine_cam``: one launch over query blocks, one or two over key blocks; no atomics.

With P the softmax, G the upstream gradient, ``E = P * (G cam' - delta)`` and ``delta_i = sum_k G_ik (P cam)_ik``:
``d query = scale E key``, ``d key = scale E' query`` and ``d cam = G + P' G``. E is zero where the mask fixed the
score. P is computed again from the log-sum-exp that forward kept. The launch over queries also writes delta, which the
one over keys reads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import load_rows, load_valid, masked_scores, product, row_products, store_rows
from .launch import Arguments, Config, Launch, Plan, aligned_rows, strides
from .refine_cam_forward import most_channels, scalars, tiles

# As in refine_cam_forward.
CONFIGS = {
    (2, 2, 128): Config(rows=128, columns=32, depth=128, warps=8, stages=2),
    (2, 2, 256): Config(rows=64, columns=32, depth=256, warps=8, stages=2),
    (2, 4, 128): Config(rows=64, columns=32, depth=128, warps=4, stages=1),
    (4, 4, 128): Config(rows=32, columns=32, depth=32, warps=4, stages=1),
    (4, 4, 256): Config(rows=32, columns=16, depth=32, warps=8, stages=1),
}
_MOST_CHANNELS = 32  # of cam, multiplied at a time


@triton.jit
def _grad_query_kernel(
    grad,  # [B, L, K]
    query,  # [B, L, D]
    key,  # [B, L, D]
    cam,  # [B, L, K]
    mask,  # [B, L] or None
    attended,  # [B, L, K] float32
    log_total,  # [B, L] float32
    delta,  # [B, L] float32, written
    grad_query,  # [B, L, D], written
    length,
    depth,
    channels,
    scale,
    grad_stride_b,
    grad_stride_l,
    grad_stride_k,
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
    ONE_GROUP: tl.constexpr,
):
    HAS_MASK: tl.constexpr = mask is not None
    most = BK if ONE_GROUP else channels  # of one group the compiler makes no loop
    blocks = tl.cdiv(length, BM)
    i_image = (tl.program_id(0) // blocks).to(tl.int64)
    o_queries = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    p_grad = grad + i_image * grad_stride_b
    p_key = key + i_image * key_stride_b
    p_cam = cam + i_image * cam_stride_b
    p_attended = attended + i_image * length * channels
    p_mask = mask + i_image * mask_stride_b if HAS_MASK else None
    p_query = query + i_image * query_stride_b
    rows = None
    if BS == BD:
        rows = load_rows(p_query, o_queries, length, depth, query_stride_l, query_stride_d, 0, BD)
    query_valid = load_valid(p_mask, o_queries, length, mask_stride_l) if HAS_MASK else o_queries < length
    log_sum = tl.load(log_total + i_image * length + o_queries, mask=o_queries < length, other=float("inf"))
    row_delta = tl.zeros([BM], tl.float32)
    for first_channel in range(0, most, BK):
        upstream = load_rows(
            p_grad, o_queries, length, channels, grad_stride_l, grad_stride_k, first_channel, BK
        )
        mean = load_rows(p_attended, o_queries, length, channels, channels, 1, first_channel, BK)
        row_delta += tl.sum(upstream.to(tl.float32) * mean, 1)
    tl.store(delta + i_image * length + o_queries, row_delta, mask=o_queries < length)

    total = tl.zeros([BM, BD], tl.float32)
    for first_key in range(0, length, BN):
        o_keys = first_key + tl.arange(0, BN)
        keys = load_rows(p_key, o_keys, length, depth, key_stride_l, key_stride_d, 0, BD)
        key_valid = load_valid(p_mask, o_keys, length, mask_stride_l) if HAS_MASK else o_keys < length
        products = row_products(
            rows,
            keys,
            p_query,
            p_key,
            o_queries,
            o_keys,
            length,
            depth,
            query_stride_l,
            query_stride_d,
            key_stride_l,
            key_stride_d,
            BM,
            BN,
            BD,
            BS,
            SCORE_OPERAND,
        )
        scores = masked_scores(
            products, scale, query_valid[:, None], key_valid[None, :], (o_keys < length)[None, :], HAS_MASK
        )
        weights = tl.exp2(scores - log_sum[:, None])  # [BM, BN]
        slope = tl.zeros([BM, BN], tl.float32)
        for first_channel in range(0, most, BK):
            upstream = load_rows(
                p_grad, o_queries, length, channels, grad_stride_l, grad_stride_k, first_channel, BK
            )
            values = load_rows(p_cam, o_keys, length, channels, cam_stride_l, cam_stride_k, first_channel, BK)
            slope = product(upstream, tl.trans(values), slope, VALUE_OPERAND)
        slope = weights * (slope - row_delta[:, None])
        if HAS_MASK:
            slope = tl.where(query_valid[:, None] & key_valid[None, :], slope, 0.0)
        total = product(slope, keys, total, SCORE_OPERAND)
    p_grad_query = grad_query + i_image * length * depth
    store_rows(p_grad_query, total * scale, o_queries, length, depth, depth, 1, 0, BD)


@triton.jit
def _grad_key_cam_kernel(
    grad,  # [B, L, K]
    query,  # [B, L, D]
    key,  # [B, L, D]
    cam,  # [B, L, K]
    mask,  # [B, L] or None
    log_total,  # [B, L] float32
    delta,  # [B, L] float32 or None
    grad_key,  # [B, L, D] or None, written
    grad_cam,  # [B, L, K] or None, written
    length,
    depth,
    channels,
    scale,
    grad_stride_b,
    grad_stride_l,
    grad_stride_k,
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
    ONE_GROUP: tl.constexpr,
):
    """Own BM keys and walk over BN queries at a time; a group is the BK channels whose grad_cam is written."""
    HAS_MASK: tl.constexpr = mask is not None
    most = BK if ONE_GROUP else channels  # of one group the compiler makes no loop
    WITH_KEY: tl.constexpr = grad_key is not None
    WITH_CAM: tl.constexpr = grad_cam is not None
    blocks = tl.cdiv(length, BM)
    groups = tl.cdiv(channels, BK) if WITH_CAM else 1
    i_group = tl.program_id(0) // blocks % groups
    i_image = (tl.program_id(0) // blocks // groups).to(tl.int64)
    o_keys = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    own_channel = i_group * BK
    p_grad = grad + i_image * grad_stride_b
    p_query = query + i_image * query_stride_b
    p_cam = cam + i_image * cam_stride_b
    p_mask = mask + i_image * mask_stride_b if HAS_MASK else None
    p_key = key + i_image * key_stride_b
    keys = None
    if BS == BD:
        keys = load_rows(p_key, o_keys, length, depth, key_stride_l, key_stride_d, 0, BD)
    key_valid = load_valid(p_mask, o_keys, length, mask_stride_l) if HAS_MASK else o_keys < length

    if WITH_KEY:
        key_total = tl.zeros([BM, BD], tl.float32)
    if WITH_CAM:
        cam_total = load_rows(
            p_grad, o_keys, length, channels, grad_stride_l, grad_stride_k, own_channel, BK
        ).to(tl.float32)
    for first_query in range(0, length, BN):
        o_queries = first_query + tl.arange(0, BN)
        rows = load_rows(p_query, o_queries, length, depth, query_stride_l, query_stride_d, 0, BD)
        query_valid = load_valid(p_mask, o_queries, length, mask_stride_l) if HAS_MASK else o_queries < length
        log_sum = tl.load(
            log_total + i_image * length + o_queries, mask=o_queries < length, other=float("inf")
        )
        products = row_products(
            keys,
            rows,
            p_key,
            p_query,
            o_keys,
            o_queries,
            length,
            depth,
            key_stride_l,
            key_stride_d,
            query_stride_l,
            query_stride_d,
            BM,
            BN,
            BD,
            BS,
            SCORE_OPERAND,
        )
        scores = masked_scores(
            products, scale, query_valid[None, :], key_valid[:, None], (o_queries < length)[None, :], HAS_MASK
        )
        weights = tl.exp2(scores - log_sum[None, :])  # [BM, BN], transposed: keys by queries
        if WITH_CAM:
            upstream = load_rows(
                p_grad, o_queries, length, channels, grad_stride_l, grad_stride_k, own_channel, BK
            )
            cam_total = product(weights, upstream, cam_total, VALUE_OPERAND)
        if WITH_KEY:
            slope = tl.zeros([BM, BN], tl.float32)
            for first_channel in range(0, most, BK):
                upstream = load_rows(
                    p_grad, o_queries, length, channels, grad_stride_l, grad_stride_k, first_channel, BK
                )
                values = load_rows(
                    p_cam, o_keys, length, channels, cam_stride_l, cam_stride_k, first_channel, BK
                )
                slope = product(values, tl.trans(upstream), slope, VALUE_OPERAND)
            row_delta = tl.load(delta + i_image * length + o_queries, mask=o_queries < length, other=0.0)
            slope = weights * (slope - row_delta[None, :])
            if HAS_MASK:
                slope = tl.where(query_valid[None, :] & key_valid[:, None], slope, 0.0)
            key_total = product(slope, rows, key_total, SCORE_OPERAND)
    if WITH_KEY:
        p_grad_key = grad_key + i_image * length * depth
        store_rows(p_grad_key, key_total * scale, o_keys, length, depth, depth, 1, 0, BD)
    if WITH_CAM:
        p_grad_cam = grad_cam + i_image * length * channels
        store_rows(p_grad_cam, cam_total, o_keys, length, channels, channels, 1, own_channel, BK)


def plan(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    cam: Tensor,
    mask: Tensor | None,
    scale: float,
    attended: Tensor,
    log_total: Tensor,
    with_scores: bool,
    with_cam: bool,
) -> Plan:
    """Plan the launches; the results are the gradients of query, key and cam.

    Those of query and key are empty without ``with_scores``, that of cam without ``with_cam``. With all of them there
    are 2 launches up to 32 channels and 3 above, where the gradient of the keys needs all channels, 32 at a time, and
    that of cam is shared among programs as in forward.
    """
    depth = query.shape[2]
    query, key = aligned_rows(query, key)
    tile, constants = tiles(query, key, cam, CONFIGS, _MOST_CHANNELS)
    together = cam.shape[2] <= _MOST_CHANNELS
    grad_query, grad_key = (
        torch.empty(t.shape if with_scores else (0,), dtype=t.dtype, device=t.device) for t in (query, key)
    )
    grad_cam = torch.empty(cam.shape if with_cam else (0,), dtype=cam.dtype, device=cam.device)
    delta = torch.empty(log_total.shape if with_scores else (0,), dtype=torch.float32, device=query.device)
    inputs: Arguments = {"grad": grad, "query": query, "key": key, "cam": cam}
    inputs |= {"mask": mask, "log_total": log_total}
    inputs |= scalars(query, key, cam, mask, scale)
    inputs |= strides(grad, "grad_stride_b", "grad_stride_l", "grad_stride_k")
    programs = query.shape[0] * triton.cdiv(query.shape[1], tile.rows)

    launches = []
    if with_scores:
        constants["ONE_GROUP"] = together
        outputs: Arguments = {"attended": attended, "delta": delta, "grad_query": grad_query}
        launches.append(Launch(_grad_query_kernel, programs, inputs | outputs, constants, tile))
        outputs = {"delta": delta, "grad_key": grad_key, "grad_cam": None}
        if with_cam and together:
            outputs["grad_cam"] = grad_cam
        launches.append(Launch(_grad_key_cam_kernel, programs, inputs | outputs, constants, tile))
    if with_cam and not (with_scores and together):
        outputs = {"delta": None, "grad_key": None, "grad_cam": grad_cam}
        _, constants = tiles(query, key, cam, CONFIGS, most_channels(cam))
        groups = triton.cdiv(cam.shape[2], constants["BK"])
        constants["ONE_GROUP"] = groups == 1
        launches.append(Launch(_grad_key_cam_kernel, programs * groups, inputs | outputs, constants, tile))
    return Plan((grad_query[..., :depth], grad_key[..., :depth], grad_cam), launches)
