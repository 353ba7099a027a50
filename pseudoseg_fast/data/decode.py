"""Decode pictures into arrays: no torch, so that inference without it reads pictures as training does."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pseudoseg_fast.data.lists import DataError

UNREADABLE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises on damaged files: its decoders let through whatever the bytes lead them to."""
IMAGE_MODES = {1: "L", 3: "RGB"}


class UnreadableImage(DataError):
    """A picture whose file is damaged or no picture at all."""


def open_upright(path: Path, max_pixels: int | None = None) -> Image.Image:
    """Decode a picture in the mode of its file, upright, as its EXIF orientation says.

    Args:
        path: the file.
        max_pixels: refuse larger pictures by their header, before any of their pixels takes memory.

    Raises:
        UnreadableImage: the file cannot be decoded, is too large, or is PostScript, for which Pillow starts a program.
        DataError: the picture holds floating-point numbers.
    """
    if path.exists() and not path.is_file():
        raise UnreadableImage(f"{path} is a folder, a pipe or a device; expected a file")
    try:
        with Image.open(path) as file:
            if file.format == "EPS":
                raise UnreadableImage(
                    f"{path} is PostScript, a program; expected a picture such as PNG or JPEG"
                )
            if max_pixels is not None and file.width * file.height > max_pixels:
                raise UnreadableImage(
                    f"{path} has {file.width} x {file.height} pixels; expected at most {max_pixels} in all, "
                    "cut it into pieces or raise --max-pixels"
                )
            file.load()
            ImageOps.exif_transpose(file, in_place=True)  # a copy would take as much memory again
            image: Image.Image = file
    except UnreadableImage:
        raise
    except UNREADABLE as error:
        raise UnreadableImage(f"{path} cannot be read as a picture: {error}") from error
    if image.mode == "F":
        raise DataError(f"{path} holds floating-point numbers; expected 8-bit or 16-bit pixels")
    return image


def to_mode(image: Image.Image, channels: int = 3) -> Image.Image:
    """Return a decoded picture as 8-bit grey (1 channel) or RGB (3); 16-bit grey keeps its high byte."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == IMAGE_MODES[channels] else image.convert(IMAGE_MODES[channels])


def read_image(path: Path, channels: int = 3) -> NDArray[np.uint8]:
    """Read a picture upright, as its EXIF orientation says, as uint8 [H, W] or [H, W, 3].

    16-bit grey pictures keep their high byte.

    Raises:
        UnreadableImage: the file cannot be decoded.
        DataError: the picture holds floating-point numbers.
    """
    return np.array(to_mode(open_upright(path), channels))
