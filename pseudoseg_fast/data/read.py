"""Read samples from files: masks, what lies on what, and every check that needs pixels.

Pictures are turned upright, as their EXIF orientation says. A mask with an orientation of its own is turned by that.
One without is taken to be upright already, as annotation tools show pictures; ``Labels.stored`` says that masks were
made on pictures as the files store them, and must be turned with them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pseudoseg_fast.data.cache import SETTLED, Arrays, remember, stamps
from pseudoseg_fast.data.decode import (
    UNREADABLE,
    UnreadableImage,
    image_size,
    open_whole,
    orientation_of,
    read_image,
    short_side_size,
    stored_orientation,
    turn_upright,
    upright,
)
from pseudoseg_fast.data.labels import IGNORE_INDEX, Labels, count_ids
from pseudoseg_fast.data.lists import DataError, File, Sample, shorten

KEPT = 100
"""Fewer masks are read each time."""


def read_mask(path: Path, labels: Labels, image: File | None = None) -> NDArray[np.uint8]:
    """Read a mask of class ids as uint8 [H, W], 255 = ignored.

    Reads one value a pixel, palette, 8-bit, 16-bit and two-colour files alike, or colours where ``labels`` has a map of
    them. A palette's colours say nothing, unless there is such a map.

    Args:
        path: the file.
        labels: what its values mean.
        image: its picture, whose orientation counts where ``labels.stored`` is set.

    Raises:
        DataError: the file cannot be decoded, is a colour picture, or holds ids that are neither classes nor ignored.
    """
    try:
        with open_whole(path) as file:
            own = orientation_of(file)  # before it is turned
            mask = upright(file)
            if labels.stored and image is not None and own == 1:
                mask = turn_upright(mask, stored_orientation(image))
            mode, ids = mask.mode, np.array(mask.convert("RGB") if labels.color_map else mask)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a mask: {error}") from error
    if labels.color_map:
        return labels.convert_colors(ids, path)
    if mode == "F":
        raise DataError(
            f"{path} holds floating-point numbers; expected one class id a pixel, as 8-bit or 16-bit PNG"
        )
    if mode not in ("P", "L", "1") and not mode.startswith("I"):
        raise DataError(
            f"{path} is a colour picture (mode {mode}){_few_colors(mask)}; expected one class id a pixel (modes P, L, "
            "1 or I;16): turn its colours into ids first, or name them: --data.color_map FILE with a line "
            "'r g b class' for each"
        )
    return labels.convert(ids.astype(np.uint8) if mode == "1" else ids, path)


def _few_colors(mask: Image.Image) -> str:
    """Return which colours a mask has, the most frequent first, or nothing where they are too many for classes."""
    colors = sorted(mask.convert("RGB").getcolors(12) or [], reverse=True)
    named = [" ".join(map(str, color)) for _, color in colors if isinstance(color, tuple)]
    return f" of {', '.join(named)}" if named else ""


def read_sample(
    sample: Sample,
    labels: Labels,
    *,
    short_side: int | None = None,
    channels: int = 3,
    white: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Read a sample as image uint8 [channels, H, W] and mask uint8 [H, W], or None without one.

    Args:
        sample: the files to read.
        labels: what the values of its mask mean.
        short_side: resize so that the shorter side has this many pixels, image bilinear and antialiased, mask nearest.
            A JPEG is decoded at the smallest size that leaves the resizing a factor of two.
        channels: as for :func:`read_image`.
        white: as for :func:`read_image`.

    Raises:
        DataError: see :func:`read_image` and :func:`read_mask`; or image and mask differ in size.
    """
    image = read_image(sample.image, channels, white, at_least=2 * (short_side or 0))
    size, mask = image.shape[:2], None
    if short_side is not None and min(size) >= 2 * short_side:
        size = image_size(sample.image)  # before it was decoded smaller
    if sample.mask is not None:
        mask = read_mask(sample.mask, labels, sample.image)
        check_size(sample, mask.shape, size)
    if short_side is not None:
        image, mask = _resize(image, mask, *short_side_size(size[0], size[1], short_side))
    pixels = torch.from_numpy(image)
    # Channels stay last in memory: torch resizes such pictures several times faster, to the same values.
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    return pixels, None if mask is None else torch.from_numpy(mask)


def check_masks(
    samples: Sequence[Sample], labels: Labels, evaluated: Collection[File] = ()
) -> NDArray[np.int64]:
    """Open the masks of labelled samples in threads and check them all: before training rather than in its middle.

    Many masks are read once for all processes and runs, see :mod:`pseudoseg_fast.data.cache`: what is kept holds until
    a mask or its picture changes.

    Args:
        samples: pictures with masks.
        labels: what the values in masks mean.
        evaluated: those of the pictures that evaluation would stop at if they cannot be read, and which are decoded,
            too; of the others training skips and counts such pictures.

    Returns:
        Labelled pixels per sample and class, [N, C].

    Raises:
        DataError: one text for all problems of all masks, the first ten in full.
    """
    if len(samples) < KEPT:
        pixels = _count_pixels(samples, labels, evaluated)
    else:
        files = [str(path) for sample in samples for path in sample[1:]]
        now, began = stamps(files), time.time_ns()

        def find() -> Arrays:
            counts = _count_pixels(samples, labels, evaluated)
            ids = np.flatnonzero(counts.any(0))
            return {
                "ids": ids,
                "counts": counts[:, ids].astype(np.uint32),
                "files": now,
                "began": np.array(began),
            }

        def fresh(kept: Arrays) -> bool:
            return bool(now[:, 1].max() < kept["began"] - SETTLED) and np.array_equal(kept["files"], now)

        question = (labels, files, sorted(map(str, evaluated)))
        known = remember("pixels", question, fresh, find)
        pixels = np.zeros((len(samples), IGNORE_INDEX + 1), np.int64)
        pixels[:, known["ids"]] = known["counts"]
    if black_and_white(labels, pixels.sum(0)):
        raise DataError(
            "the masks hold no pixel of class 1, only 0 and 255, and 255 means ignored; for masks drawn in black and "
            f"white give --data.label_map 255:1, or write 1 for the foreground (first mask: {samples[0].mask})"
        )
    return pixels[:, : labels.classes]


def _count_pixels(
    samples: Sequence[Sample], labels: Labels, evaluated: Collection[File]
) -> NDArray[np.int64]:
    """Read masks, and the pictures to evaluate on; return the pixels of the masks by id, [N, 256]."""

    def check(sample: Sample) -> NDArray[np.int64] | str:
        if sample.mask is None:
            return f"{sample.name} has no mask"
        decode = sample.image in evaluated
        try:
            mask = read_mask(sample.mask, labels, sample.image)
            check_size(sample, mask.shape, image_size(sample.image, decode=decode))
        except UnreadableImage as error:
            if decode:
                return str(error)
        except DataError as error:
            return str(error)
        return count_ids(mask)

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        results = list(
            tqdm(
                pool.map(check, samples),
                "masks",
                len(samples),
                unit="mask",
                disable=None if len(samples) >= KEPT else True,
            )
        )
    problems = [result for result in results if isinstance(result, str)]
    if problems:
        raise DataError(
            f"{len(problems)} of {len(samples)} pictures with masks cannot be used; repair them, or remove them and "
            f"take them off lists, python -m pseudoseg_fast.check says what else is wrong:\n{shorten(problems)}"
        )
    return np.array([result for result in results if not isinstance(result, str)]).reshape(len(samples), -1)


def black_and_white(labels: Labels, pixels: NDArray[np.int64]) -> bool:
    """Say whether pixel counts by id, [256], look like those of two classes drawn as 0 and 255."""
    converted = labels.label_map or labels.layout_map or labels.reduce_zero_label or labels.color_map
    if converted or labels.ignore_index != IGNORE_INDEX or labels.classes != 2 or not len(pixels):
        return False
    return pixels[0] > 0 and pixels[1] == 0 and pixels[IGNORE_INDEX] > 0


def check_size(sample: Sample, mask: Sequence[int], image: Sequence[int]) -> None:
    """Refuse a mask that does not cover its picture."""
    if tuple(mask) != tuple(image):
        turned = tuple(mask) == tuple(image)[::-1]
        raise DataError(
            f"{sample.mask} has {mask[1]} x {mask[0]} pixels, its picture {sample.image} has {image[1]} x {image[0]} "
            "(upright, as its EXIF orientation says); expected the same size"
            + (
                "; masks made on pictures as they are stored need --data.mask_orientation stored"
                if turned
                else ""
            )
        )


def _resize(
    image: NDArray[np.uint8], mask: NDArray[np.uint8] | None, height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Resize image and mask."""
    channels = [image] if image.ndim == 2 or image.shape[2] == 3 else [*np.moveaxis(image, 2, 0)]
    planes = [
        np.array(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
        for plane in channels
    ]
    resized = planes[0] if len(planes) == 1 else np.stack(planes, 2)
    if mask is None:
        return resized, None
    return resized, np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))
