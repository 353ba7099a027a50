"""Read every file of a data set, in threads, and note what it holds; nothing that is wrong stops it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pseudoseg_fast.data.decode import UNREADABLE, describe_file, is_tiff, read_image
from pseudoseg_fast.data.labels import Labels, WrongIds, count_ids
from pseudoseg_fast.data.lists import DataError, File, Sample
from pseudoseg_fast.data.read import check_size, read_mask

_AHEAD = 64  # samples per thread that are read before their turn


@dataclass(frozen=True)
class Scan:
    """What the files of one sample hold.

    Args:
        sample: the files.
        problem: why the picture cannot be used, or None.
        mask_problem: why the mask cannot be used, or None.
        wrong_ids: ids in the mask that mean nothing.
        size: height and width of the upright picture.
        mode: how the file stores its pixels.
        turned: whether EXIF turns the picture.
        peak: largest value of a picture of more than 8 bits.
        digest: of the bytes of a picture that can be used.
        levels: [channels, 256] pixels of each value.
        pixels: [256] pixels of each class id, 255 = ignored.
    """

    sample: Sample
    problem: str | None = None
    mask_problem: str | None = None
    wrong_ids: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    mode: str = ""
    turned: bool = False
    peak: float | None = None
    digest: bytes = b""
    levels: NDArray[np.int64] | None = None
    pixels: NDArray[np.int64] | None = None


def scan(
    samples: Sequence[Sample], labels: Labels, channels: int = 3, white: float | None = None
) -> Iterator[Scan]:
    """Yield what each sample's files hold, in order.

    Args:
        samples: pictures with masks or without.
        labels: what the values in masks mean.
        channels: as for :func:`~pseudoseg_fast.data.decode.read_image`.
        white: likewise.
    """
    threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(samples), _AHEAD * threads):
            part = samples[start : start + _AHEAD * threads]
            yield from pool.map(lambda sample: scan_one(sample, labels, channels, white), part)


def scan_one(sample: Sample, labels: Labels, channels: int = 3, white: float | None = None) -> Scan:
    """Return what one sample's files hold."""
    problem = mask_problem = levels = pixels = size = peak = None
    mode, turned = "", False
    wrong_ids: tuple[int, ...] = ()
    try:
        mode, _, turned, peak = describe_file(sample.image)
        image = read_image(sample.image, channels, white)
        size = (image.shape[0], image.shape[1])
        planes = image.reshape(image.shape[0] * image.shape[1], -1)
        levels = np.stack([np.bincount(plane, minlength=256) for plane in planes.T])
    except DataError as error:
        problem = str(error)
    except (MemoryError, *UNREADABLE) as error:
        problem = f"{sample.image} cannot be read as a picture: {error!r}"
    if sample.mask is not None:
        try:
            mask = read_mask(sample.mask, labels, sample.image)
            pixels = count_ids(mask)
            if size is not None:
                check_size(sample, mask.shape, size)
        except WrongIds as error:
            mask_problem, wrong_ids = str(error), error.ids
        except DataError as error:
            mask_problem = str(error)
        except (MemoryError, *UNREADABLE) as error:
            mask_problem = f"{sample.mask} cannot be read as a mask: {error!r}"
    digest = b"" if problem else content_hash(sample.image)  # a pipe or a device would never end
    return Scan(sample, problem, mask_problem, wrong_ids, size, mode, turned, peak, digest, levels, pixels)


def content_hash(path: File) -> bytes:
    """Return a hash of a file's bytes; empty for a file that can no longer be read."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
    except OSError:
        return b""


def is_dark(found: Scan) -> bool:
    """Say whether a picture of more than 8 bits fills less than half of 16, so that a value for white must be known.

    The colours of a PNG of 16 bits are read by their high byte alone, whatever they fill.
    """
    if found.peak is None or (found.mode.endswith("of 16 bits") and not is_tiff(found.sample.image)):
        return False
    return found.peak < 1 << 15


def mean_and_std(levels: NDArray[np.int64]) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation in [0, 1] per channel of pixels counted by value, [channels, 256]."""
    values = np.arange(256) / 255
    total = levels.sum(1)
    mean = levels @ values / total
    variance = levels @ values**2 / total - mean**2
    return mean.round(4).tolist(), np.sqrt(variance.clip(min=0)).round(4).tolist()
