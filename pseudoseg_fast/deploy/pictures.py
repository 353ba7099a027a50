"""Open pictures for inference as training read them, of any number of channels (no torch)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pseudoseg_fast.data.decode import (
    IMAGE_MODES,
    UnreadableImage,
    image_size,
    open_upright,
    read_image,
    to_mode,
)


class Planes:
    """A picture of a number of channels that no mode of Pillow has: one grey image each, cut and resized alike."""

    def __init__(self, planes: Sequence[Image.Image]) -> None:
        self.planes = tuple(planes)
        self.size = planes[0].size
        self.width, self.height = self.size

    def crop(self, box: tuple[int, int, int, int]) -> Planes:
        """Return a part, as Pillow's ``crop``."""
        return Planes([plane.crop(box) for plane in self.planes])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> Planes:
        """Return it at another size, as Pillow's ``resize``."""
        return Planes([plane.resize(size, resample) for plane in self.planes])


Picture = Image.Image | Planes


def open_picture(path: Path, channels: int, white: float | None, max_pixels: int) -> Picture:
    """Open a picture upright; grey and colour stay in the mode of their file, of which tiles are cut first.

    Args:
        path: the file.
        channels: of the model's pictures.
        white: value that became 255 in training in pictures of more than 8 bits; None kept the high byte.
        max_pixels: refuse larger pictures by their header.

    Raises:
        UnreadableImage: the file cannot be decoded, or is too large.
        DataError: it has other channels than the model takes, or values whose range is not known.
    """
    if channels in IMAGE_MODES and white is None:
        with contextlib.suppress(UnidentifiedImageError):  # a TIFF file for read_image
            return open_upright(path, max_pixels)
    height, width = image_size(path)
    if height * width > max_pixels:
        raise UnreadableImage(
            f"{path} has {width} x {height} pixels; expected at most {max_pixels} in all, cut it into pieces or raise "
            "--max-pixels"
        )
    pixels = read_image(path, channels, white)
    if channels in IMAGE_MODES:
        return Image.fromarray(pixels)
    return Planes([Image.fromarray(np.ascontiguousarray(pixels[..., k])) for k in range(channels)])


def to_pixels(picture: Picture, channels: int) -> NDArray[np.uint8]:
    """Return a picture as uint8 [channels, H, W].

    Raises:
        ValueError: it is grey or colour, and the model takes neither.
    """
    if isinstance(picture, Planes):
        return np.stack([np.asarray(plane) for plane in picture.planes])
    if channels not in IMAGE_MODES:
        raise ValueError(f"the model takes pictures of {channels} channels, this one is grey or colour")
    pixels = np.asarray(to_mode(picture, channels))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def to_color(picture: Picture) -> Image.Image:
    """Return a picture as RGB, to be drawn on; of many channels the first three, of two the first."""
    if not isinstance(picture, Planes):
        return to_mode(picture)
    planes = picture.planes[:3] if len(picture.planes) > 2 else picture.planes[:1] * 3
    return Image.merge("RGB", planes)
