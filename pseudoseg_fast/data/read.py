"""Read pictures and masks from files: decoding, orientation, and every check that needs pixels."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor

from pseudoseg_fast.data.decode import UNREADABLE, UnreadableImage, read_image
from pseudoseg_fast.data.lists import DataError, Sample, shorten

IGNORE_INDEX = 255
MAX_CLASSES = 255
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def read_mask(path: Path, classes: int, ignore_index: int = IGNORE_INDEX) -> NDArray[np.uint8]:
    """Read a mask of class ids as uint8 [H, W], ``ignore_index`` replaced by 255.

    Reads one value a pixel: palette, 8-bit and 16-bit grey, and two-colour files. A palette's colours say nothing.

    Raises:
        DataError: the file cannot be decoded, is a colour picture, or holds ids that are neither classes nor ignored.
    """
    try:
        with Image.open(path) as file:
            mode, ids = file.mode, np.array(file)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a mask: {error}") from error
    if mode not in ("P", "L", "1") and not mode.startswith("I"):
        raise DataError(
            f"{path} is a colour picture (mode {mode}); expected one class id a pixel (modes P, L, 1 or I;16): "
            "turn its colours into ids first"
        )
    ids = ids.astype(np.uint8) if mode == "1" else ids
    present = np.flatnonzero(np.bincount(ids.ravel())) if ids.dtype == np.uint8 else np.unique(ids)
    wrong = [str(value) for value in present if not 0 <= value < classes and value != ignore_index]
    if wrong:
        shown = ", ".join(wrong[:8]) + (", ..." if len(wrong) > 8 else "")
        raise DataError(
            f"{path} holds the ids {shown}; expected 0 to {classes - 1}, or {ignore_index} for ignored"
        )
    if ignore_index != IGNORE_INDEX:
        return np.where(ids == ignore_index, IGNORE_INDEX, ids).astype(np.uint8)
    return ids.astype(np.uint8, copy=False)


def read_sample(
    sample: Sample,
    classes: int,
    *,
    short_side: int | None = None,
    channels: int = 3,
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Tensor, Tensor | None]:
    """Read a sample as image uint8 [channels, H, W] and mask uint8 [H, W], or None without one.

    Args:
        sample: the files.
        classes: number of classes C; mask ids are 0 to C - 1.
        short_side: resize so that the shorter side has this many pixels: the image bilinearly with antialiasing, the
            mask to the nearest pixel.
        channels: 3 for colour, 1 for grey.
        ignore_index: mask id without a label; 255 in the returned mask.

    Raises:
        UnreadableImage: the picture cannot be decoded.
        DataError: the mask is not as :func:`read_mask` expects, or not of the picture's size.
    """
    image = read_image(sample.image, channels)
    mask = None
    if sample.mask is not None:
        mask = read_mask(sample.mask, classes, ignore_index)
        _check_sizes(sample, mask.shape, image.shape[:2])
    if short_side is not None:
        image, mask = _resize(image, mask, short_side)
    pixels = torch.from_numpy(image)
    pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1).contiguous()
    return pixels, None if mask is None else torch.from_numpy(mask)


def check_masks(samples: Sequence[Sample], classes: int, ignore_index: int = IGNORE_INDEX) -> list[int]:
    """Open the masks of labelled samples in threads and check them all: before training rather than in its middle.

    Returns:
        Labelled pixels per class, [C].

    Raises:
        DataError: one text for all problems of all masks, the first ten in full.
    """

    def check(sample: Sample) -> NDArray[np.int64] | str:
        if sample.mask is None:
            return f"{sample.name} has no mask"
        try:
            mask = read_mask(sample.mask, classes, ignore_index)
            _check_sizes(sample, mask.shape, _upright_size(sample.image))
        except UnreadableImage:
            pass  # training skips and counts unreadable pictures, evaluation stops at them
        except DataError as error:
            return str(error)
        return np.bincount(mask.ravel(), minlength=IGNORE_INDEX + 1)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(check, samples))
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        raise DataError(f"{len(problems)} of {len(samples)} masks cannot be used:\n{shorten(problems)}")
    pixels = np.sum(np.stack([result for result in results if not isinstance(result, str)]), axis=0)
    if classes == 2 and ignore_index == IGNORE_INDEX and pixels[1] == 0 and pixels[IGNORE_INDEX] > 0:
        raise DataError(
            f"the masks hold no pixel of class 1, only 0 and 255, and 255 means ignored; write 1 for the foreground "
            f"(first mask: {samples[0].mask})"
        )
    return [int(count) for count in pixels[:classes]]


def _check_sizes(sample: Sample, mask: Sequence[int], image: Sequence[int]) -> None:
    """Refuse a mask that does not cover its picture."""
    if tuple(mask) != tuple(image):
        raise DataError(
            f"{sample.mask} has {mask[1]} x {mask[0]} pixels, its picture {sample.image} has {image[1]} x {image[0]} "
            "(upright, as its EXIF orientation says); expected the same size"
        )


def _upright_size(path: Path) -> tuple[int, int]:
    """Return height and width from a picture's header."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            sideways = image.getexif().get(ExifTags.Base.Orientation) in _SIDEWAYS
    except UNREADABLE as error:
        raise UnreadableImage(f"{path} cannot be read as a picture: {error}") from error
    return (width, height) if sideways else (height, width)


def _resize(
    image: NDArray[np.uint8], mask: NDArray[np.uint8] | None, short_side: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Resize so that the shorter side has ``short_side`` pixels."""
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    size = (round(width * scale), round(height * scale))
    resized = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    if mask is None:
        return resized, None
    return resized, np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
