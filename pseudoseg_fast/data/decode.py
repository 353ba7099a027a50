"""Decode pictures into arrays: no torch, so that inference without it reads pictures as training does."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from pseudoseg_fast.data.lists import DataError, File

UNREADABLE = (
    *(ArithmeticError, AttributeError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
"""What Pillow raises on damaged files: its decoders let through whatever the bytes lead them to."""
IMAGE_MODES = {1: "L", 3: "RGB"}
_TIFF = (".tif", ".tiff")
# Tags of TIFF
_WIDTH, _LENGTH, _BITS, _COMPRESSION, _SAMPLES, _PLANES = 256, 257, 258, 259, 277, 284
_KIND, _EXTRA = 262, 338  # what the numbers mean, and what the samples beside them do
_GREY_OR_RGB = (0, 1, 2)
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
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


def short_side_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Return height and width of a picture whose shorter side is resized to ``short_side`` pixels, rounded."""
    scale = short_side / min(height, width)
    return round(height * scale), round(width * scale)


@contextlib.contextmanager
def _reading(path: File, *, but_tiff: bool = False) -> Iterator[None]:
    """Name the file in what damaged ones make Pillow and tifffile raise, but for TIFF files that Pillow cannot read."""
    try:
        yield
    except DataError:
        raise
    except UNREADABLE as error:
        if but_tiff and isinstance(error, UnidentifiedImageError) and is_tiff(path):
            raise
        raise UnreadableImage(f"{path} cannot be read as a picture: {error}") from error


def open_upright(path: File, max_pixels: int | None = None) -> Image.Image:
    """Decode a picture in the mode of its file, upright, as its EXIF orientation says.

    Args:
        path: the file.
        max_pixels: refuse larger pictures by their header, before any of their pixels takes memory.

    Raises:
        UnreadableImage: the file cannot be decoded, is too large, or is PostScript, for which Pillow starts a program.
        UnidentifiedImageError: it is a TIFF file that is for :func:`read_image`.
        DataError: the picture holds floating-point numbers.
    """
    with _reading(path, but_tiff=True), open_whole(path) as file:
        if max_pixels is not None and file.width * file.height > max_pixels:
            raise UnreadableImage(
                f"{path} has {file.width} x {file.height} pixels; expected at most {max_pixels} in all, "
                "cut it into pieces or raise --max-pixels"
            )
        file.load()
        ImageOps.exif_transpose(file, in_place=True)  # a copy would take as much memory again
        image: Image.Image = file
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

    Grey and colour are turned into each other as ``channels`` wants, and what the file says is alpha is dropped. Any
    other number of channels must be the file's own; TIFF files of them need the package tifffile.

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
    with _reading(path):
        if channels in IMAGE_MODES:
            try:
                return _read_pillow(path, channels, white, at_least)
            except UnidentifiedImageError:
                if not is_tiff(path):
                    raise
        stored = _read_channels(path, white)
    pixels = stored.pixels
    if channels in IMAGE_MODES and stored.inks:
        raise DataError(f"{path} holds inks (CMYK); expected grey or RGB, convert it")
    if channels in IMAGE_MODES and stored.alpha:
        pixels = pixels[..., :-1]
    if channels == 3 and pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    if pixels.shape[2] != channels:
        raise DataError(
            f"{path} has {pixels.shape[2]} channels, expected {channels}: train with --model.in_channels "
            f"{pixels.shape[2]} if all pictures are like this one, or save them with {channels}"
        )
    pixels = _to_bytes(pixels, white, path)
    return np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels)


def image_size(path: File, *, decode: bool = False) -> tuple[int, int]:
    """Return height and width of the upright picture from a file's header.

    Args:
        path: the file.
        decode: decode all of it, too, so that a damaged file is noticed.

    Raises:
        UnreadableImage: the file is no picture, or cannot be decoded.
        DataError: only a package that is not installed can read it.
    """
    with _reading(path):
        height, width, orientation = _stored(path, decode)
        if width * height == 0:
            raise ValueError(f"it has {width} x {height} pixels")
    return (width, height) if orientation in _SIDEWAYS else (height, width)


def stored_orientation(path: File) -> int:
    """Return the EXIF orientation that a file is stored in."""
    return _stored(path)[2]


def _stored(path: File, decode: bool = False) -> tuple[int, int, int]:
    """Return height and width as a file's header has them, and its EXIF orientation; decode all of it on request."""
    try:
        with open_whole(path) as image:
            width, height = image.size
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose size newer versions of Pillow turn
                width, height = image.tag_v2[_WIDTH], image.tag_v2[_LENGTH]
            orientation = orientation_of(image)
            if decode:
                _decode(image, path)
            return height, width, orientation
    except UnidentifiedImageError:
        if not is_tiff(path):
            raise
    with _open_tiff(path) as file:
        series = file.series[0]
        axis = _channel_axis(series.shape, series.axes, path)
        height, width = (side for index, side in enumerate(series.shape) if index != axis)
        if decode:
            series.asarray()
        return height, width, _orientation_tag(file)


def _decode(image: Image.Image, path: File) -> None:
    """Decode an open picture, or a TIFF file with alpha as tifffile does, which reads it where alpha is wanted, too."""
    try:
        image.load()
    except UNREADABLE:
        if not is_tiff(path) or len(image.getbands()) in IMAGE_MODES:
            raise
        _read_channels(path)


class Description(NamedTuple):
    """How a picture is stored.

    Attributes:
        mode: of its pixels, in words.
        channels: 1 for grey, 3 for colour whatever its mode and alpha, or the number that the file has.
        turned: whether EXIF turns it.
        peak: the largest value where it has more than 8 bits. Of colour of 16 bits the high byte is known, and this is
            the largest value that it may stand for.
    """

    mode: str
    channels: int
    turned: bool
    peak: float | None


def describe_file(path: File) -> Description:
    """Return how a file stores a picture.

    Raises:
        UnreadableImage: the file is no picture.
        DataError: only a package that is not installed can read it.
    """
    with _reading(path):
        try:
            with open_whole(path) as image:
                high_byte = has_deep_color(image)
                turned = orientation_of(image) != 1
                if high_byte:
                    highest = int(np.max(np.asarray(image.convert("RGB"))))
                    return Description(f"{image.mode} of 16 bits", 3, turned, 256.0 * highest + 255)
                deep = image.mode == "F" or image.mode.startswith("I")
                channels = 1 if deep or image.mode in ("1", "L", "LA") else 3
                return Description(image.mode, channels, turned, _peak(np.asarray(image)) if deep else None)
        except UnidentifiedImageError:
            if not is_tiff(path):
                raise
            stored = _read_channels(path)
    pixels = stored.pixels
    count = pixels.shape[2]
    channels = 3 if stored.inks and count == 4 else count - stored.alpha
    peak = None if pixels.dtype == np.uint8 else _peak(pixels)
    return Description(f"{count} channels of {pixels.dtype}", channels, stored.orientation != 1, peak)


def _peak(pixels: NDArray[Any]) -> float:
    """Return the largest value, NaN only where there is no other."""
    return float(np.fmax.reduce(pixels, axis=None))


def _read_pillow(path: File, channels: int, white: float | None, at_least: int) -> NDArray[np.uint8]:
    """Read a grey or colour picture."""
    with open_whole(path) as file:
        if at_least:
            file.draft(None, (at_least, at_least))  # keeps the mode
        if white is not None and has_deep_color(file):
            if is_tiff(path) and file.mode in ("RGB", "RGBA"):
                raise UnidentifiedImageError("Pillow keeps the high byte of its 16 bits")
            raise _deep_color_of_no_use(path)
        image = upright(file)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_bytes(np.asarray(image), white, path))
    return np.array(image if image.mode == IMAGE_MODES[channels] else image.convert(IMAGE_MODES[channels]))


def open_whole(path: File) -> Image.Image:
    """Open a picture that Pillow can read whole.

    Raises:
        UnreadableImage: it is no file, or PostScript, for which Pillow starts a program.
        UnidentifiedImageError: it cannot; of a TIFF file whose channels are pages it sees the first one alone, channels
            beside grey or colour that are no alpha it leaves out, and separate planes of 16 bits it takes for one
            another.
    """
    if isinstance(path, Path) and path.exists() and not path.is_file():
        raise UnreadableImage(f"{path} is a folder, a pipe or a device; expected a file")
    image = Image.open(_file(path))
    if image.format == "EPS":
        image.close()
        raise UnreadableImage(f"{path} is PostScript, a program; expected a picture such as PNG or JPEG")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        planes = tags.get(_PLANES) == 2 and tags.get(_SAMPLES, 1) > 1 and tags.get(_COMPRESSION, 1) == 1
        if is_tiff(path) and image.n_frames > 1:
            image.close()
            raise UnidentifiedImageError("it has several pages, of which Pillow reads the first")
        if is_tiff(path) and tags.get(_KIND) in _GREY_OR_RGB and 0 in tags.get(_EXTRA, ()):
            image.close()
            raise UnidentifiedImageError("it has more channels than grey or colour, which Pillow leaves out")
        if is_tiff(path) and planes and max(tags.get(_BITS, (1,))) > 8:
            image.close()
            raise UnidentifiedImageError("it has separate planes of 16 bits, which Pillow mixes up")
        if orientation_of(image) in _SIDEWAYS and isinstance(path, Path):
            image.close()  # a file that Pillow maps into memory would get the sides of the upright picture
            image = Image.open(io.BytesIO(path.read_bytes()))
    return image


def _file(path: File) -> Path | io.BytesIO:
    """Return what libraries open."""
    return path if isinstance(path, Path) else io.BytesIO(path.read_bytes())


class _Stored(NamedTuple):
    """What a file holds.

    Attributes:
        pixels: [H, W, channels].
        orientation: that they are stored in.
        inks: whether they are inks.
        alpha: whether the last channel is alpha, beside grey or colour.
    """

    pixels: NDArray[Any]
    orientation: int
    inks: bool
    alpha: bool


def _read_channels(path: File, white: float | None = None) -> _Stored:
    """Read a file upright and otherwise as it is."""
    if not is_tiff(path):
        with open_whole(path) as image:
            if white is not None and has_deep_color(image):
                raise _deep_color_of_no_use(path)
            orientation = orientation_of(image)
            pixels = np.array(upright(image))
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return _Stored(pixels, orientation, image.mode == "CMYK", image.mode in ("LA", "RGBA"))
    with _open_tiff(path) as file:
        series = file.series[0]
        pixels, axis = series.asarray(), _channel_axis(series.shape, series.axes, path)
        orientation = _orientation_tag(file)
        tags = file.pages.first.tags
        kind, extra = tags.valueof(_KIND), tags.valueof(_EXTRA, ())
        inks = kind == 5 and pixels.ndim == 3
    if pixels.size == 0:
        raise UnreadableImage(f"{path} cannot be read as a picture: it has no pixels")
    pixels = pixels[..., None] if axis is None else np.moveaxis(pixels, axis, 2)
    return _Stored(
        _turn_array(pixels, orientation), orientation, inks, _has_alpha(pixels.shape[2], kind, extra)
    )


def _has_alpha(channels: int, kind: int, extra: Sequence[int]) -> bool:
    """Say whether the last channel of a TIFF file is alpha by its tags; a fourth one of colour need not be named."""
    if kind == 2:
        return channels == 4 and 0 not in extra
    return kind in _GREY_OR_RGB and channels == 2 and len(extra) == 1 and 0 not in extra


@contextlib.contextmanager
def _open_tiff(path: File) -> Iterator[Any]:
    """Open a file with tifffile.

    Raises:
        UnreadableImage: it is damaged, or no TIFF file.
        DataError: the package is not installed.
    """
    source = _file(path)
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(source.open("rb")) if isinstance(source, Path) else source
        start = opened.read(4)
        opened.seek(0)  # tifffile reads on from where a file stands
    if start not in _TIFF_MAGIC:
        raise UnreadableImage(f"{path} cannot be read as a picture: it is no TIFF file")
    try:
        import tifffile
    except ImportError as error:
        raise DataError(
            f"{path} is a TIFF file that only the package tifffile can read; run: pip install 'pseudoseg-fast[tiff]'"
        ) from error
    try:
        with tifffile.TiffFile(source) as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # a damaged file meets tifffile's own errors, struct's, numpy's and zlib's
        raise UnreadableImage(f"{path} cannot be read as a picture: {error}") from error


def _channel_axis(shape: Sequence[int], axes: str, path: File) -> int | None:
    """Return which axis of a TIFF file's array counts channels, None for one of rows and columns alone."""
    if len(shape) == 2:
        return None
    if len(shape) == 3 and axes[:2] == "YX":
        return 2
    if len(shape) == 3 and axes[0] not in "YX" and axes[1:] == "YX":
        # Unnamed, "Q", are the axes of an array written as it is: the channels are its shortest one, first or last.
        return 2 if axes[0] == "Q" and shape[2] < shape[0] else 0
    raise DataError(f"{path} has the axes {axes} of sizes {list(shape)}; expected rows, columns and channels")


def _orientation_tag(file: Any) -> int:
    return int(file.pages.first.tags.valueof("Orientation", 1))


def _to_bytes(pixels: NDArray[Any], white: float | None, path: File) -> NDArray[np.uint8]:
    """Scale pixels of any type to 0..255."""
    if pixels.dtype == np.uint8:
        return pixels
    if white is not None:
        scaled = np.nan_to_num(pixels.astype(np.float32) * (255 / white), nan=0.0)
        return (scaled.clip(0, 255) + 0.5).astype(np.uint8)
    if pixels.dtype.kind not in "iu":
        raise DataError(
            f"{path} holds floating-point numbers; expected 8-bit or 16-bit pixels, or training with --data.white "
            "VALUE, the value that is white"
        )
    return (pixels.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)


def is_tiff(path: File) -> bool:
    """Say whether a file is TIFF by its name."""
    return path.suffix.lower() in _TIFF


def has_deep_color(image: Image.Image) -> bool:
    """Say whether an open file, not yet loaded, has colour or alpha of 16 bits, of which Pillow keeps the high byte."""
    # Pillow's decoders name their raw format in the tile, such as RGB;16B; grey ones of 16 bits it reads in full.
    return bool(image.tile) and ";16" in str(image.tile[0][3]) and not image.mode.startswith("I")  # type: ignore[attr-defined]


def _deep_color_of_no_use(path: File) -> DataError:
    return DataError(
        f"{path} has colour or alpha of 16 bits, whose high byte alone can be read from this kind of file, so "
        "data.white cannot scale it; save it as TIFF, or leave data.white out"
    )


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of a file, 1 where it has none or, TIFF, was turned upright when it was loaded."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) else 1  # damaged headers hold anything


def upright(file: Image.Image) -> Image.Image:
    """Return an open picture turned as its EXIF orientation says."""
    file.load()  # turns TIFF files, which have no orientation from then on
    return turn_upright(file, orientation_of(file))


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return a picture turned as an EXIF orientation says."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _turn_array(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return pixels [H, W, ...] turned as an EXIF orientation says."""
    if orientation in _SIDEWAYS:  # mirrored at the diagonal they are 1, 2, 3 and 4
        pixels, orientation = pixels.swapaxes(0, 1), orientation - 4
    if orientation in (2, 3):
        pixels = pixels[:, ::-1]
    return pixels[::-1] if orientation in (3, 4) else pixels
