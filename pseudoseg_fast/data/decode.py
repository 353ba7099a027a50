"""Decode pictures into arrays: no torch, so that inference without it reads pictures as training does."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from pseudoseg_fast.data.lists import DataError, File

UNREADABLE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises on damaged files: its decoders let through whatever the bytes lead them to."""
IMAGE_MODES = {1: "L", 3: "RGB"}
_TIFF = (".tif", ".tiff")
_DEEP_COLOR = "RGB;16"  # Pillow's name for 16-bit colour, of which it keeps the high byte
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class UnreadableImage(DataError):
    """A picture whose file is damaged or no picture at all."""


def open_upright(path: File, max_pixels: int | None = None) -> Image.Image:
    """Decode a picture in the mode of its file, upright, as its EXIF orientation says.

    Args:
        path: the file.
        max_pixels: refuse larger pictures by their header, before any of their pixels takes memory.

    Raises:
        UnreadableImage: the file cannot be decoded, is too large, or is PostScript, for which Pillow starts a program.
        DataError: the picture holds floating-point numbers.
    """
    try:
        with open_whole(path) as file:
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


def read_image(
    path: File, channels: int = 3, white: float | None = None, at_least: int = 0
) -> NDArray[np.uint8]:
    """Read a picture upright, as its EXIF orientation says, as uint8 [H, W] for one channel or [H, W, channels].

    Grey and colour are turned into each other as ``channels`` wants, and an alpha channel is dropped. Any other number
    of channels must be the file's own; TIFF files of them need the package tifffile.

    Args:
        path: the file.
        channels: 1 for grey, 3 for colour, or the number that the file has.
        white: value that becomes 255 in pictures of more than 8 bits, 0 staying 0; None keeps the high byte of 16.
        at_least: where not 0, a JPEG may come at a half, a quarter or an eighth of its size, as long as its shorter
            side keeps this many pixels: what is to be made small is decoded several times faster.

    Raises:
        UnreadableImage: the file cannot be decoded.
        DataError: the picture has other channels, or values whose range is not known.
    """
    try:
        if channels in IMAGE_MODES:
            try:
                return _read_pillow(path, channels, white, at_least)
            except UnidentifiedImageError:
                if path.suffix.lower() not in _TIFF:
                    raise
        pixels = _read_channels(path)
    except DataError:
        raise
    except UNREADABLE as error:
        raise UnreadableImage(f"{path} cannot be read as a picture: {error}") from error
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if channels == 3 and pixels.shape[2] == 4:
        pixels = pixels[..., :3]
    if pixels.shape[2] != channels:
        raise DataError(
            f"{path} has {pixels.shape[2]} channels, expected {channels}: give --model.in_channels {pixels.shape[2]} "
            "if all pictures are like this one"
        )
    pixels = _to_bytes(pixels, white, path)
    return pixels[..., 0] if channels == 1 else np.ascontiguousarray(pixels)


def image_size(path: File) -> tuple[int, int]:
    """Return height and width of the upright picture from a file's header.

    Raises:
        UnreadableImage: the file is no picture.
    """
    try:
        try:
            with open_whole(path) as image:
                width, height = image.size
                if width * height == 0:
                    raise ValueError(f"it has {width} x {height} pixels")
                return (width, height) if orientation_of(image) in _SIDEWAYS else (height, width)
        except UnidentifiedImageError:
            if path.suffix.lower() not in _TIFF:
                raise
            height, width = _read_channels(path).shape[:2]
            return height, width
    except DataError:
        raise
    except UNREADABLE as error:
        raise UnreadableImage(f"{path} cannot be read as a picture: {error}") from error


def describe_file(path: File) -> tuple[str, bool, float | None]:
    """Return how a file stores its pixels, whether EXIF turns it, and the largest value where it has more than 8 bits.

    Raises:
        UnreadableImage: the file is no picture.
        DataError: only a package that is not installed can read it.
    """
    try:
        try:
            with open_whole(path) as image:
                deep = image.mode == "F" or image.mode.startswith("I")
                return (
                    image.mode,
                    orientation_of(image) != 1,
                    float(np.max(np.asarray(image))) if deep else None,
                )
        except UnidentifiedImageError:
            if path.suffix.lower() not in _TIFF:
                raise
            pixels = _read_channels(path)
    except DataError:
        raise
    except UNREADABLE as error:
        raise UnreadableImage(f"{path} cannot be read as a picture: {error}") from error
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    peak = None if pixels.dtype == np.uint8 else float(pixels.max())
    return f"{channels} channels of {pixels.dtype}", False, peak


def _read_pillow(path: File, channels: int, white: float | None, at_least: int) -> NDArray[np.uint8]:
    """Read a grey or colour picture."""
    with open_whole(path) as file:
        if at_least:
            file.draft(None, (at_least, at_least))  # keeps the mode
        # Pillow's decoders name their raw format in the tile; 16-bit colour is 8-bit by the time it is decoded.
        raw = str(file.tile[0][3]) if file.tile else ""
        if white is not None and _DEEP_COLOR in raw:
            raise DataError(
                f"{path} is a 16-bit colour picture of a kind whose high byte alone can be read, so data.white cannot "
                "scale it; save it as TIFF, or leave data.white out"
            )
        image = turn_upright(file, orientation_of(file))
        image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(np.asarray(image), white, path))
    return np.array(image if image.mode == IMAGE_MODES[channels] else image.convert(IMAGE_MODES[channels]))


def open_whole(path: File) -> Image.Image:
    """Open a picture that Pillow can read whole.

    Raises:
        UnreadableImage: it is no file, or PostScript, for which Pillow starts a program.
        UnidentifiedImageError: it cannot; of a TIFF file whose channels are pages it sees the first one alone.
    """
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise UnreadableImage(f"{path} is a folder, a pipe or a device; expected a file")
    image = Image.open(_file(path))
    if image.format == "EPS":
        image.close()
        raise UnreadableImage(f"{path} is PostScript, a program; expected a picture such as PNG or JPEG")
    if path.suffix.lower() in _TIFF and getattr(image, "n_frames", 1) > 1:
        image.close()
        raise UnidentifiedImageError("it has several pages")
    return image


def _file(path: File) -> Path | io.BytesIO:
    """Return what libraries open."""
    return path if isinstance(path, Path) else io.BytesIO(path.read_bytes())


def _read_channels(path: File) -> NDArray[Any]:
    """Read a file as [H, W] or [H, W, channels], as it is."""
    if path.suffix.lower() not in _TIFF:
        with open_whole(path) as image:
            return np.array(turn_upright(image, orientation_of(image)))
    try:
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{path} is a TIFF file that only the package tifffile can read; run: pip install 'pseudoseg-fast[tiff]'"
        ) from error
    try:
        with tifffile.TiffFile(_file(path)) as file:
            pixels, axes = file.series[0].asarray(), file.series[0].axes
    except (
        Exception
    ) as error:  # a damaged file meets tifffile's own errors as well as struct's, numpy's and zlib's
        raise UnreadableImage(f"{path} cannot be read as a picture: {error}") from error
    if pixels.size == 0:
        raise UnreadableImage(f"{path} cannot be read as a picture: it has no pixels")
    if pixels.ndim == 3 and axes[0] not in "YX" and axes[1:] == "YX":
        pixels = np.moveaxis(pixels, 0, 2)
    elif not (pixels.ndim == 2 or (pixels.ndim == 3 and axes[:2] == "YX")):
        raise DataError(
            f"{path} has the axes {axes} of sizes {list(pixels.shape)}; expected rows, columns and channels"
        )
    return pixels


def _to_bytes(pixels: NDArray[Any], white: float | None, path: File) -> NDArray[np.uint8]:
    """Scale pixels of any type to 0..255."""
    if pixels.dtype == np.uint8:
        return pixels
    if white is not None:
        scaled = np.nan_to_num(pixels.astype(np.float32) * (255 / white), nan=0.0)
        return (scaled.clip(0, 255) + 0.5).astype(np.uint8)
    if pixels.dtype.kind not in "iu":
        raise DataError(
            f"{path} holds floating-point numbers; expected 8-bit or 16-bit pixels, or --data.white VALUE, the value "
            "that is white"
        )
    return (pixels.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of a file, 1 where it has none."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) else 1  # damaged headers hold anything


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return a picture turned as an EXIF orientation says."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
