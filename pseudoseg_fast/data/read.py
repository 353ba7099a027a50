"""Read pictures and masks from files: decoding, orientation, and every check that needs pixels.

Pictures are turned upright, as their EXIF orientation says. A mask with an orientation of its own is turned by that.
One without is taken to be upright already, as annotation tools show pictures; ``Labels.stored`` says that masks were
made on pictures as the files store them, and must be turned with them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from pseudoseg_fast.data.labels import IGNORE_INDEX, Labels
from pseudoseg_fast.data.lists import DataError, Sample, shorten

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
_IMAGE_MODES = {1: "L", 3: "RGB"}
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


def read_image(path: Path, channels: int = 3, white: float | None = None) -> NDArray[np.uint8]:
    """Read a picture upright, as its EXIF orientation says, as uint8 [H, W] for one channel or [H, W, channels].

    Grey and colour are turned into each other as ``channels`` wants, and an alpha channel is dropped. Any other number
    of channels must be the file's own; TIFF files of them need the package tifffile.

    Args:
        path: the file.
        channels: 1 for grey, 3 for colour, or the number that the file has.
        white: value that becomes 255 in pictures of more than 8 bits, 0 staying 0; None keeps the high byte of 16.

    Raises:
        UnreadableImage: the file cannot be decoded.
        DataError: the picture has other channels, or values whose range is not known.
    """
    try:
        if channels in _IMAGE_MODES:
            try:
                return _read_pillow(path, channels, white)
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


def read_mask(path: Path, labels: Labels, image: Path | None = None) -> NDArray[np.uint8]:
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
        with _open(path) as file:
            orientation = _orientation(file)
            mode, mask = file.mode, file.convert("RGB") if labels.color_map else file
            if labels.stored and image is not None and orientation == 1:
                with Image.open(image) as picture:
                    orientation = _orientation(picture)
            ids = np.array(_upright(mask, orientation))
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read as a mask: {error}") from error
    if labels.color_map:
        return labels.convert_colors(ids, path)
    if mode not in ("P", "L", "1") and not mode.startswith("I"):
        raise DataError(
            f"{path} is a colour picture (mode {mode}); expected one class id a pixel (modes P, L, 1 or I;16): "
            "turn its colours into ids first, or name them: --data.color_map FILE with a line 'r g b class' for each"
        )
    return labels.convert(ids.astype(np.uint8) if mode == "1" else ids, path)


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
        channels: as for :func:`read_image`.
        white: as for :func:`read_image`.

    Raises:
        DataError: see :func:`read_image` and :func:`read_mask`; or image and mask differ in size.
    """
    image = read_image(sample.image, channels, white)
    mask = None
    if sample.mask is not None:
        mask = read_mask(sample.mask, labels, sample.image)
        check_size(sample, mask.shape, image.shape[:2])
    if short_side is not None:
        image, mask = _resize(image, mask, short_side)
    pixels = torch.from_numpy(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
    return pixels, None if mask is None else torch.from_numpy(mask)


def check_masks(samples: Sequence[Sample], labels: Labels) -> NDArray[np.int64]:
    """Open the masks of labelled samples in threads and check them all: before training rather than in its middle.

    Returns:
        Labelled pixels per sample and class, [N, C].

    Raises:
        DataError: one text for all problems of all masks, the first ten in full.
    """

    def check(sample: Sample) -> NDArray[np.int64] | str:
        if sample.mask is None:
            return f"{sample.name} has no mask"
        try:
            mask = read_mask(sample.mask, labels, sample.image)
            check_size(sample, mask.shape, image_size(sample.image))
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
    pixels = np.array([result for result in results if not isinstance(result, str)]).reshape(len(samples), -1)
    if black_and_white(labels, pixels.sum(0)):
        raise DataError(
            "the masks hold no pixel of class 1, only 0 and 255, and 255 means ignored; for masks drawn in black and "
            f"white give --data.label_map 255:1, or write 1 for the foreground (first mask: {samples[0].mask})"
        )
    return pixels[:, : labels.classes]


def black_and_white(labels: Labels, pixels: NDArray[np.int64]) -> bool:
    """Say whether pixel counts by id, [256], look like those of two classes drawn as 0 and 255."""
    plain = not (labels.label_map or labels.color_map) and labels.ignore_index == IGNORE_INDEX
    return labels.classes == 2 and plain and len(pixels) > 0 and pixels[1] == 0 and pixels[IGNORE_INDEX] > 0


def image_size(path: Path) -> tuple[int, int]:
    """Return height and width of the upright picture from a file's header.

    Raises:
        UnreadableImage: the file is no picture.
    """
    try:
        try:
            with _open(path) as image:
                width, height = image.size
                if width * height == 0:
                    raise ValueError(f"it has {width} x {height} pixels")
                return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)
        except UnidentifiedImageError:
            if path.suffix.lower() not in _TIFF:
                raise
            height, width = _read_channels(path).shape[:2]
            return height, width
    except DataError:
        raise
    except UNREADABLE as error:
        raise UnreadableImage(f"{path} cannot be read as a picture: {error}") from error


def describe_file(path: Path) -> tuple[str, bool, float | None]:
    """Return how a file stores its pixels, whether EXIF turns it, and the largest value where it has more than 8 bits.

    Raises:
        UnreadableImage: the file is no picture.
        DataError: only a package that is not installed can read it.
    """
    try:
        try:
            with _open(path) as image:
                deep = image.mode == "F" or image.mode.startswith("I")
                return (
                    image.mode,
                    _orientation(image) != 1,
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


def _read_pillow(path: Path, channels: int, white: float | None) -> NDArray[np.uint8]:
    """Read a grey or colour picture."""
    with _open(path) as file:
        # Pillow's decoders name their raw format in the tile; 16-bit colour is 8-bit by the time it is decoded.
        raw = str(file.tile[0][3]) if file.tile else ""
        if white is not None and _DEEP_COLOR in raw:
            raise DataError(
                f"{path} is a 16-bit colour picture of a kind whose high byte alone can be read, so data.white cannot "
                "scale it; save it as TIFF, or leave data.white out"
            )
        image = _upright(file, _orientation(file))
        image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(np.asarray(image), white, path))
    return np.array(image.convert(_IMAGE_MODES[channels]))


def _open(path: Path) -> Image.Image:
    """Open a picture that Pillow can read whole.

    Raises:
        UnidentifiedImageError: it cannot; of a TIFF file whose channels are pages it sees the first one alone.
    """
    image = Image.open(path)
    if path.suffix.lower() in _TIFF and getattr(image, "n_frames", 1) > 1:
        image.close()
        raise UnidentifiedImageError("it has several pages")
    return image


def _read_channels(path: Path) -> NDArray[Any]:
    """Read a file as [H, W] or [H, W, channels], as it is."""
    if path.suffix.lower() not in _TIFF:
        with Image.open(path) as image:
            return np.array(_upright(image, _orientation(image)))
    try:
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{path} is a TIFF file that only the package tifffile can read; run: pip install 'pseudoseg-fast[tiff]'"
        ) from error
    try:
        with tifffile.TiffFile(path) as file:
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


def _to_bytes(pixels: NDArray[Any], white: float | None, path: Path) -> NDArray[np.uint8]:
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


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) else 1  # damaged headers hold anything


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


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
    image: NDArray[np.uint8], mask: NDArray[np.uint8] | None, short_side: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Resize so that the shorter side has ``short_side`` pixels."""
    height, width = image.shape[:2]
    scale = short_side / min(height, width)
    size = (round(width * scale), round(height * scale))
    channels = [image] if image.ndim == 2 or image.shape[2] == 3 else [*np.moveaxis(image, 2, 0)]
    planes = [np.array(Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR)) for plane in channels]
    resized = planes[0] if len(planes) == 1 else np.stack(planes, 2)
    if mask is None:
        return resized, None
    return resized, np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))
