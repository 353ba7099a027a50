"""Fuse two low-resolution maps into a soft pseudo label: upsample, scale, softmax, mix, sharpen, write once.

A program owns a run of target pixels and all classes of them, so both softmaxes, the mix and the sharpening stay in
registers, and nothing at the label size but the label itself is written or read. Per label element: one write, 8 reads
that mostly hit the first cache, and 2 exponentials (4 special-function operations for a general temperature).
"""

import triton
import triton.language as tl
from torch import Tensor

from pseudoseg_fast.reference import NORM_EPS

from .bilinear import axis_scale, upsampled
from .launch import Config, Launch, Plan, strides
from .logit_scale import launch as square_sums

# Classes, padded -> pixels and warps of a program; "columns" is how many partial sums are added at a time. Chosen by
# reasoning and by what compiles without spills; no GPU has compared them.
CONFIGS = {
    32: Config(rows=64, columns=512, warps=8, stages=1),
    64: Config(rows=32, columns=512, warps=8, stages=1),
    256: Config(rows=8, columns=512, warps=8, stages=1),
    1024: Config(rows=2, columns=512, warps=8, stages=1),
}
MAX_CLASSES = max(CONFIGS)
_MAX_PIXELS = 2**31 - 2**10  # so that the pixels of one image are counted in 32 bits

_EPS = tl.constexpr(NORM_EPS)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softmax(logits, inside, BOUNDED: tl.constexpr):
    """Return the softmax over the first axis; BOUNDED says that no logit is far from 0."""
    logits = logits * _LOG2_E
    if not BOUNDED:
        logits = logits - tl.max(tl.where(inside, logits, float("-inf")), 0)[None, :]
    powers = tl.where(inside, tl.exp2(logits), 0.0)
    return powers / tl.sum(powers, 0)[None, :]


@triton.jit
def _fuse_kernel(
    decoder,  # [B, C, h, w]
    cam,  # [B, C, h2, w2]
    affine,  # [2, C] float32 or None: factor and offset of cam
    squares,  # [B, sums per image] float32 or None
    label,  # [B, C, H, W], written
    classes,
    height,
    width,
    gamma,
    sharpness,
    sums,
    inverse_count,
    decoder_height,
    decoder_width,
    decoder_scale_y,
    decoder_scale_x,
    decoder_stride_b,
    decoder_stride_c,
    decoder_stride_h,
    decoder_stride_w,
    cam_height,
    cam_width,
    cam_scale_y,
    cam_scale_x,
    cam_stride_b,
    cam_stride_c,
    cam_stride_h,
    cam_stride_w,
    NORM: tl.constexpr,
    SHARPEN: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
):
    pixels = height * width
    blocks = tl.cdiv(pixels, BP)
    i_image = (tl.program_id(0) // blocks).to(tl.int64)
    o_pixel = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    o_y = o_pixel // width
    o_x = o_pixel % width
    o_class = tl.arange(0, BC)
    inside = (o_class < classes)[:, None] & (o_y < height)[None, :]  # [BC, BP]

    p = upsampled(
        decoder + i_image * decoder_stride_b,
        o_class,
        inside,
        o_y,
        o_x,
        decoder_height,
        decoder_width,
        decoder_scale_y,
        decoder_scale_x,
        decoder_stride_c,
        decoder_stride_h,
        decoder_stride_w,
        ALIGN_CORNERS,
    )
    m = upsampled(
        cam + i_image * cam_stride_b,
        o_class,
        inside,
        o_y,
        o_x,
        cam_height,
        cam_width,
        cam_scale_y,
        cam_scale_x,
        cam_stride_c,
        cam_stride_h,
        cam_stride_w,
        ALIGN_CORNERS,
    )
    if affine is not None:  # weights of an upsampling add up to 1, so the batch norm may follow it
        factor = tl.load(affine + o_class, mask=o_class < classes, other=0.0)
        offset = tl.load(affine + classes + o_class, mask=o_class < classes, other=0.0)
        m = m * factor[:, None] + offset[:, None]
    if NORM == "pixel":
        scale = tl.rsqrt(tl.sum(tl.where(inside, p * p + m * m, 0.0), 0) + _EPS)
        p = p * scale[None, :]
        m = m * scale[None, :]
    elif NORM != "none":
        p_squares = squares + i_image * sums if NORM == "image" else squares
        total = tl.zeros([BS], tl.float32)
        for first in range(0, sums, BS):
            o_sum = first + tl.arange(0, BS)
            total += tl.load(p_squares + o_sum, mask=o_sum < sums, other=0.0)
        scale = tl.rsqrt(tl.sum(total, 0) * inverse_count + _EPS)
        p = p * scale
        m = m * scale

    y = gamma * _softmax(p, inside, NORM == "pixel") + (1.0 - gamma) * _softmax(m, inside, NORM == "pixel")
    if SHARPEN == "square":
        y = y * y
        y = y / tl.sum(y, 0)[None, :]
    elif SHARPEN == "power":
        y = tl.where(inside, tl.log2(y) * sharpness, float("-inf"))
        y = tl.exp2(y - tl.max(y, 0)[None, :])
        y = y / tl.sum(y, 0)[None, :]
    offsets = (i_image * classes + o_class.to(tl.int64))[:, None] * pixels
    offsets += o_pixel[None, :]
    tl.store(label + offsets, y.to(label.dtype.element_ty), mask=inside)


def launch(
    decoder: Tensor,
    cam: Tensor,
    size: tuple[int, int],
    gamma: float,
    temperature: float,
    norm: str,
    align_corners: bool,
    squares: Tensor | None,
    affine: Tensor | None = None,
) -> tuple[Tensor, Launch]:
    """Plan one launch; return the label [B, C, H, W] that it writes too.

    ``squares`` [B, n] are the sums of ``logit_scale``, for the norms of a batch or an image; ``affine`` [2, C] is what
    every class of cam is still to be multiplied by and increased by.
    """
    images, classes = decoder.shape[:2]
    height, width = size
    if height * width > _MAX_PIXELS:
        raise ValueError(f"a label of the Triton kernels has at most {_MAX_PIXELS} pixels, got size {size}")
    label = decoder.new_empty((images, classes, height, width))
    padded = triton.next_power_of_2(classes)
    tile = next(config for limit, config in CONFIGS.items() if padded <= limit)
    sums, count = 0, 1
    if squares is not None:
        of_batch = norm == "batch"
        sums = squares.numel() if of_batch else squares.shape[1]
        count = 2 * classes * height * width * (images if of_batch else 1)
    maps: dict[str, int | float] = {}
    for name, logits in (("decoder", decoder), ("cam", cam)):
        maps |= {f"{name}_height": logits.shape[2], f"{name}_width": logits.shape[3]}
        for axis, source, target in zip("yx", logits.shape[2:], size, strict=True):
            maps[f"{name}_scale_{axis}"] = axis_scale(source, target, align_corners)
        maps |= strides(logits, *(f"{name}_stride_{axis}" for axis in "bchw"))
    arguments = {
        "decoder": decoder,
        "cam": cam,
        "affine": affine,
        "squares": squares,
        "label": label,
        "classes": classes,
        "height": height,
        "width": width,
        "gamma": gamma,
        "sharpness": 1 / temperature,
        "sums": sums,
        "inverse_count": 1 / max(count, 1),  # an empty batch is launched nowhere
        **maps,
    }
    constants = {
        "NORM": norm,
        "SHARPEN": {0.5: "square", 1.0: "none"}.get(temperature, "power"),
        "ALIGN_CORNERS": align_corners,
        "BP": tile.rows,
        "BC": padded,
        "BS": tile.columns,
    }
    programs = images * triton.cdiv(height * width, tile.rows)
    return label, Launch(_fuse_kernel, programs, arguments, constants, tile)


def plan(
    decoder: Tensor,
    cam: Tensor,
    size: tuple[int, int],
    gamma: float,
    temperature: float,
    norm: str,
    align_corners: bool,
) -> Plan:
    """Plan the launches: 2 for the norms ``"batch"`` and ``"image"``, 1 for the others."""
    launches = []
    squares = None
    if norm in ("batch", "image"):
        squares, sums = square_sums(decoder, cam, size, align_corners)
        launches.append(sums)
    label, fusion = launch(decoder, cam, size, gamma, temperature, norm, align_corners, squares)
    return Plan((label,), [*launches, fusion])
