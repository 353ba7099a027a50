"""Sum the squares of two upsampled maps without upsampling them: what the norm of a fusion needs.

``sum(up(X)^2) = <X, (Wy'Wy) X (Wx'Wx)>``, a 9-point stencil on the low-resolution map. Every program sums a part of one
map of one image for 16 classes, and its sum is written once; whoever needs the scale adds the sums, of which there are
hundreds, in their order. Both low-resolution maps are read once.

The map that attention made comes before its batch norm. This launch then also combines the batch statistics, and
writes factor and offset of every class for the fusion.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .batch_norm import batch_norm
from .bilinear import axis_scale, bands, targets_per_node
from .launch import Arguments, Config, Launch, strides

# Rows and columns of a tile. Chosen by reasoning; no GPU has measured it. 64 columns take up to 128 registers, about
# where compilers begin to spill.
CONFIG = Config(rows=8, columns=32, warps=4, stages=1)
CLASSES = 16
"""Classes of a program."""
_ROW_PARTS = 8
"""Programs that share the rows of a map; they take its tiles in turn."""


class BatchNorm:
    """The batch norm between attention and fusion: its partial statistics, its shift, and what they amount to.

    Attributes:
        blocks: mean and sum of squared deviations of blocks of positions, [B * blocks per image, 2, C] float32.
        shift: [C].
        affine: factor and offset of every class, [2, C] float32, written by the launch that combines the blocks.
    """

    def __init__(self, blocks: Tensor, shift: Tensor, images: int, length: int, block_rows: int) -> None:
        self.blocks, self.shift = blocks, shift
        self.affine = blocks.new_empty((2, shift.shape[0]))
        self.arguments: Arguments = {
            "blocks": blocks,
            "shift": shift,
            "affine": self.affine,
            "images": images,
            "length": length,
            "shift_stride": shift.stride(0),
        }
        self.constants = {"BLOCK_ROWS": block_rows, "BP": 64}

    def launch(self) -> Launch:
        """Combine the blocks on their own, where no norm of the batch is wanted: a handful of programs."""
        classes = self.shift.shape[0]
        arguments: Arguments = self.arguments | {"classes": classes}
        constants = self.constants | {"BC": CLASSES}
        return Launch(_batch_norm_kernel, triton.cdiv(classes, CLASSES), arguments, constants, CONFIG)


@triton.jit
def _batch_norm_kernel(
    blocks,  # [B * blocks per image, 2, C] float32
    shift,  # [C]
    affine,  # [2, C] float32, written
    images,
    length,
    shift_stride,
    classes,
    BLOCK_ROWS: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    o_class = tl.program_id(0) * BC + tl.arange(0, BC)
    factor, offset = batch_norm(blocks, shift, o_class, classes, images, length, shift_stride, BLOCK_ROWS, BP)
    tl.store(affine + o_class, factor, mask=o_class < classes)
    tl.store(affine + classes + o_class, offset, mask=o_class < classes)


@triton.jit
def _nodes(p_map, o_node, inside_y, inside_x, factor, offset):
    inside = inside_y[:, None] & inside_x[None, :]
    value = tl.load(p_map + o_node, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, value * factor + offset, 0.0)


@triton.jit
def _form(
    p_map,
    i_part,
    first_class,
    classes,
    height,
    width,
    target_height,
    target_width,
    scale_y,
    scale_x,
    reach_y,
    reach_x,
    stride_c,
    stride_h,
    stride_w,
    o_class,
    factor,
    offset,
    ROW_PARTS: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    """Sum the form over every ROW_PARTS-th tile of rows of one tile of columns, for the classes ``o_class`` [BC]."""
    columns = tl.cdiv(width, BX)
    o_x = i_part % columns * BX + tl.arange(0, BX)
    diagonal_x, beside_x = bands(o_x, width, target_width, scale_x, reach_x, ALIGN_CORNERS, 16)
    total = tl.zeros([BY, BX], tl.float32)
    for i_row in range(i_part // columns, tl.cdiv(height, BY), ROW_PARTS):
        o_y = i_row * BY + tl.arange(0, BY)
        diagonal_y, beside_y = bands(o_y, height, target_height, scale_y, reach_y, ALIGN_CORNERS, 16)
        # Neighbours share these offsets and differ by a scalar: a thread keeps one 64-bit offset of a node, not four.
        o_node = o_y.to(tl.int64)[:, None] * stride_h + o_x.to(tl.int64)[None, :] * stride_w
        rows = tl.zeros([BY, BX], tl.float32)
        pairs = tl.zeros([BY, BX], tl.float32)
        for i_class in range(first_class, tl.minimum(first_class + BC, classes)):
            f = tl.sum(tl.where(o_class == i_class, factor, 0.0), 0)
            b = tl.sum(tl.where(o_class == i_class, offset, 0.0), 0)
            p = p_map + tl.cast(i_class, tl.int64) * stride_c
            here = _nodes(p, o_node, o_y < height, o_x < width, f, b)
            right = _nodes(p + stride_w, o_node, o_y < height, o_x + 1 < width, f, b)
            below = _nodes(p + stride_h, o_node, o_y + 1 < height, o_x < width, f, b)
            across = _nodes(p + stride_h + stride_w, o_node, o_y + 1 < height, o_x + 1 < width, f, b)
            rows += here * (diagonal_x[None, :] * here + 2.0 * beside_x[None, :] * right)
            pairs += diagonal_x[None, :] * here * below
            pairs += beside_x[None, :] * (here * across + right * below)
        total += diagonal_y[:, None] * rows + 2.0 * beside_y[:, None] * pairs
    return tl.sum(tl.sum(total, 1), 0)


@triton.jit
def _squares_kernel(
    decoder,  # [B, C, h, w]
    cam,  # [B, C, h2, w2]
    blocks,  # [B * blocks per image, 2, C] float32 or None
    shift,  # [C] or None
    affine,  # [2, C] float32 or None, written
    squares,  # [B, sums per image] float32, written
    images,
    length,
    shift_stride,
    classes,
    height,
    width,
    decoder_parts,
    decoder_height,
    decoder_width,
    decoder_scale_y,
    decoder_scale_x,
    decoder_reach_y,
    decoder_reach_x,
    decoder_stride_b,
    decoder_stride_c,
    decoder_stride_h,
    decoder_stride_w,
    cam_parts,
    cam_height,
    cam_width,
    cam_scale_y,
    cam_scale_x,
    cam_reach_y,
    cam_reach_x,
    cam_stride_b,
    cam_stride_c,
    cam_stride_h,
    cam_stride_w,
    BLOCK_ROWS: tl.constexpr,
    BP: tl.constexpr,
    DECODER_ROW_PARTS: tl.constexpr,
    CAM_ROW_PARTS: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
):
    groups = tl.cdiv(classes, BC)
    parts = decoder_parts + cam_parts
    first_class = tl.program_id(0) % groups * BC
    i_part = tl.program_id(0) // groups % parts
    i_image = (tl.program_id(0) // groups // parts).to(tl.int64)
    o_class = first_class + tl.arange(0, BC)
    factor = tl.full([BC], 1.0, tl.float32)
    offset = tl.zeros([BC], tl.float32)
    if i_part < decoder_parts:
        total = _form(
            decoder + i_image * decoder_stride_b,
            i_part,
            first_class,
            classes,
            decoder_height,
            decoder_width,
            height,
            width,
            decoder_scale_y,
            decoder_scale_x,
            decoder_reach_y,
            decoder_reach_x,
            decoder_stride_c,
            decoder_stride_h,
            decoder_stride_w,
            o_class,
            factor,
            offset,
            DECODER_ROW_PARTS,
            BY,
            BX,
            BC,
            ALIGN_CORNERS,
        )
    else:
        if affine is not None:
            factor, offset = batch_norm(
                blocks, shift, o_class, classes, images, length, shift_stride, BLOCK_ROWS, BP
            )
            if (i_part == decoder_parts) & (i_image == 0):
                tl.store(affine + o_class, factor, mask=o_class < classes)
                tl.store(affine + classes + o_class, offset, mask=o_class < classes)
        total = _form(
            cam + i_image * cam_stride_b,
            i_part - decoder_parts,
            first_class,
            classes,
            cam_height,
            cam_width,
            height,
            width,
            cam_scale_y,
            cam_scale_x,
            cam_reach_y,
            cam_reach_x,
            cam_stride_c,
            cam_stride_h,
            cam_stride_w,
            o_class,
            factor,
            offset,
            CAM_ROW_PARTS,
            BY,
            BX,
            BC,
            ALIGN_CORNERS,
        )
    tl.store(squares + tl.program_id(0).to(tl.int64), total)


def launch(
    decoder: Tensor,
    cam: Tensor,
    size: tuple[int, int],
    align_corners: bool,
    norm: BatchNorm | None = None,
) -> tuple[Tensor, Launch]:
    """Plan one launch; return the sums of squares [B, n] that it writes too, float32.

    Their sum over an image is the sum of squares of both maps at this size. With ``norm``, cam is what comes before
    the batch norm, and the launch writes its factor and offset.
    """
    images, classes = decoder.shape[:2]
    groups = triton.cdiv(classes, CLASSES)
    maps: dict[str, int | float] = {}
    constants = {}
    parts = 0
    for name, logits in (("decoder", decoder), ("cam", cam)):
        row_parts = min(_ROW_PARTS, triton.cdiv(logits.shape[2], CONFIG.rows))
        count = row_parts * triton.cdiv(logits.shape[3], CONFIG.columns)
        parts += count
        constants[f"{name.upper()}_ROW_PARTS"] = row_parts
        maps |= {f"{name}_parts": count, f"{name}_height": logits.shape[2], f"{name}_width": logits.shape[3]}
        for axis, source, target in zip("yx", logits.shape[2:], size, strict=True):
            maps[f"{name}_scale_{axis}"] = axis_scale(source, target, align_corners)
            maps[f"{name}_reach_{axis}"] = targets_per_node(source, target, align_corners)
        maps |= strides(logits, *(f"{name}_stride_{axis}" for axis in "bchw"))
    squares = decoder.new_empty((images, parts * groups), dtype=torch.float32)
    empty: Arguments = {
        "blocks": None,
        "shift": None,
        "affine": None,
        "images": 0,
        "length": 0,
        "shift_stride": 0,
    }
    arguments: Arguments = {
        "decoder": decoder,
        "cam": cam,
        "squares": squares,
        "classes": classes,
        "height": size[0],
        "width": size[1],
        **(empty if norm is None else norm.arguments),
        **maps,
    }
    constants |= {"BLOCK_ROWS": 1, "BP": 1} if norm is None else norm.constants
    constants |= {"BY": CONFIG.rows, "BX": CONFIG.columns, "BC": CLASSES, "ALIGN_CORNERS": align_corners}
    return squares, Launch(_squares_kernel, squares.numel(), arguments, constants, CONFIG)
