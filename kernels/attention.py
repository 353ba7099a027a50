"""What the attention kernels share: loading rows, products, scores and the one pass over the keys.

Names: ``i_`` an index, ``o_`` offsets, BM rows that a program owns, BN rows that it walks over at a time, BD channels
of query and key, BS of them multiplied at a time, BK value channels. Scores are kept in units of log2, so that
``exp2`` serves.

Products of float32 operands are taken as three TF32 products (``tf32x3``): one would lose 13 bits, and on plain
float32 units it would take longer. Their operands are split in registers, so long rows are multiplied BS at a time.
"""

import triton
import triton.language as tl

from pseudoseg_fast.reference import MASKED_SCORE

from .launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)
_MASKED_SCORE = tl.constexpr(MASKED_SCORE * 1.4426950408889634)


@triton.jit
def load_rows(p_map, o_rows, rows, columns, stride_row, stride_column, first_column, BLOCK: tl.constexpr):
    """Load [len(o_rows), BLOCK] values from ``first_column`` on; zero outside [rows, columns]."""
    o_columns = first_column + tl.arange(0, BLOCK)
    inside = (o_rows < rows)[:, None] & (o_columns < columns)[None, :]
    offsets = o_rows.to(tl.int64)[:, None] * stride_row + o_columns.to(tl.int64)[None, :] * stride_column
    return tl.load(p_map + offsets, mask=inside, other=0.0)


@triton.jit
def store_rows(
    p_map, values, o_rows, rows, columns, stride_row, stride_column, first_column, BLOCK: tl.constexpr
):
    """Store [len(o_rows), BLOCK] values; those outside [rows, columns] are dropped."""
    o_columns = first_column + tl.arange(0, BLOCK)
    inside = (o_rows < rows)[:, None] & (o_columns < columns)[None, :]
    offsets = o_rows.to(tl.int64)[:, None] * stride_row + o_columns.to(tl.int64)[None, :] * stride_column
    tl.store(p_map + offsets, values.to(p_map.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, c, OPERAND: tl.constexpr):
    """Return ``a b + c`` in float32, the operands rounded to OPERAND."""
    a = a.to(OPERAND)
    b = b.to(OPERAND)
    if _INTERPRETED:  # its bfloat16 products are wrong; those of the same values in float32 are exact
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="tf32x3")


@triton.jit
def load_valid(p_mask, o_rows, rows, stride_row):
    """Load whether positions are valid; those beyond the last are not."""
    return tl.load(p_mask + o_rows.to(tl.int64) * stride_row, mask=o_rows < rows, other=0) != 0


@triton.jit
def masked_scores(products, scale, query_valid, key_valid, inside, HAS_MASK: tl.constexpr):
    """Return scores in units of log2 from products; the three masks broadcast to their shape.

    All pairs of an invalid query have one score. It is taken as 0 in place of -1e9, which changes no softmax and
    keeps the log-sum-exp of such a row exact.
    """
    scores = products * (scale * _LOG2_E)
    if HAS_MASK:
        scores = tl.where(key_valid, scores, _MASKED_SCORE)
        scores = tl.where(query_valid, scores, 0.0)
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def row_products(
    own,
    other,
    p_own,
    p_other,
    o_own,
    o_other,
    length,
    depth,
    own_stride_l,
    own_stride_d,
    other_stride_l,
    other_stride_d,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Return the products of rows of query and key [BM, BN]; the loaded rows themselves serve if BS is all of BD."""
    products = tl.zeros([BM, BN], tl.float32)
    if BS == BD:
        products = product(own, tl.trans(other), products, OPERAND)
    else:
        for first in range(0, BD, BS):
            left = load_rows(p_own, o_own, length, depth, own_stride_l, own_stride_d, first, BS)
            right = load_rows(p_other, o_other, length, depth, other_stride_l, other_stride_d, first, BS)
            products = product(left, tl.trans(right), products, OPERAND)
    return products


@triton.jit
def attend(
    p_query,
    p_key,
    p_cam,
    p_mask,
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
    BM: tl.constexpr,
    BN: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    SCORE_OPERAND: tl.constexpr,
    VALUE_OPERAND: tl.constexpr,
):
    """Return the softmax-weighted mean of cam [BM, BK] and the log-sum-exp of the scores [BM] of some queries.

    One pass over the keys of an image with a running maximum; the pointers are those of the image.
    """
    HAS_MASK: tl.constexpr = p_mask is not None
    query = None
    if BS == BD:
        query = load_rows(p_query, o_queries, length, depth, query_stride_l, query_stride_d, 0, BD)
    query_valid = load_valid(p_mask, o_queries, length, mask_stride_l) if HAS_MASK else o_queries < length
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM, BK], tl.float32)
    for first_key in range(0, length, BN):
        o_keys = first_key + tl.arange(0, BN)
        key = None
        if BS == BD:
            key = load_rows(p_key, o_keys, length, depth, key_stride_l, key_stride_d, 0, BD)
        key_valid = load_valid(p_mask, o_keys, length, mask_stride_l) if HAS_MASK else o_keys < length
        products = row_products(
            query,
            key,
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
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])  # [BM, BN]
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        cam = load_rows(p_cam, o_keys, length, channels, cam_stride_l, cam_stride_k, first_channel, BK)
        mean = product(weights, cam, mean * shrink[:, None], VALUE_OPERAND)
        highest = higher
    return mean / total[:, None], highest + tl.log2(total)
