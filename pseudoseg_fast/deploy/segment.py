"""Segment pictures of any size with a model: sizes of training, test-time augmentation, tiles (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pseudoseg_fast.data.decode import short_side_size, to_mode
from pseudoseg_fast.deploy.model import Maps, Model, Pixels
from pseudoseg_fast.deploy.pictures import Picture, to_pixels
from pseudoseg_fast.deploy.tiles import Answers, Span, check_tiles, enlarged, spans, stitch

Size = tuple[int, int]
MOST_VALUES = 2**28
"""How many values, of classes x height x width, the model is made to hold for one picture or tile: 1 GiB."""


@dataclass(frozen=True)
class Settings:
    """How pictures are segmented.

    Args:
        flip: average with the answer to the mirrored picture.
        scales: average the answers to the picture at these sizes.
        tile: pictures larger than this many pixels on a side are cut into tiles of at most this side.
        overlap: pixels that neighbouring tiles share at least; None: an eighth of a tile.
        batch_size: pictures or tiles in one run of the model.
        short_side: resize pictures first so that their shorter side has this many pixels; None: never.
        probabilities: answer them, not only class ids.

    Raises:
        ValueError: a value is out of its range.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    tile: int = 1024
    overlap: int | None = None
    batch_size: int = 4
    short_side: int | None = None
    probabilities: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_tiles(self.tile, self.shared)
        if not self.scales or not all(0.1 <= scale <= 4 for scale in self.scales):
            raise ValueError(
                f"--scales expects factors from 0.1 to 4, got {' '.join(map(str, self.scales)) or 'none'}"
            )
        if self.batch_size < 1:
            raise ValueError(f"--batch-size expects at least 1, got {self.batch_size}")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"--short-side expects at least 1 pixel, got {self.short_side}")

    @property
    def shared(self) -> int:
        """Pixels that neighbouring tiles share at least."""
        return self.tile // 8 if self.overlap is None else self.overlap


@dataclass
class Result:
    """What a picture was found to show.

    Attributes:
        labels: class ids uint8 [H, W], at the picture's size.
        probabilities: float16 [C, h, w] in 0..1, or None unless asked for; at the size of
            :meth:`Segmenter.answer_size`.
    """

    labels: Pixels
    probabilities: NDArray[np.floating] | None


class Segmenter:
    """Segments pictures by ``settings``.

    Raises:
        ValueError: the settings need probabilities and the model answers labels alone.
    """

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model = model
        self.settings = settings
        self.averages = settings.flip or settings.scales != (1.0,)
        if model.metadata.output == "labels" and (self.averages or settings.probabilities):
            raise ValueError(
                "--flip, --scales and --probabilities need a model that answers probabilities, this one answers "
                "labels: export it with --output probabilities"
            )

    def working_size(self, picture: Picture) -> Size:
        """Return height and width at which a picture is seen."""
        if self.settings.short_side is None:
            return picture.height, picture.width
        return short_side_size(picture.height, picture.width, self.settings.short_side)

    def is_large(self, picture: Picture) -> bool:
        """Tell whether a picture is cut into tiles."""
        return max(self.working_size(picture)) > self.settings.tile

    def answer_size(self, picture: Picture) -> Size:
        """Return height and width at which a picture is answered: its own, so that nothing need be enlarged.

        It is smaller where the answer to the picture, or to one of its tiles, would hold more than ``MOST_VALUES``, but
        not smaller than the size at which the picture is seen.
        """
        seen, full = self.working_size(picture), (picture.height, picture.width)
        if self.is_large(picture) and full[0] < seen[0]:
            return seen
        # Of the picture, the share that is answered at a time.
        share = math.prod(rows[0].stop / rows[-1].stop for rows in self._tiles(seen))
        factor = math.sqrt(MOST_VALUES / (len(self.model.metadata.classes) * share * math.prod(full)))
        if factor >= 1:
            return full
        height, width = (max(least, int(most * factor)) for least, most in zip(seen, full, strict=True))
        return height, width

    def group_key(self, picture: Picture) -> tuple[Size, Size]:
        """Return what pictures of one batch have in common: the sizes at which they are seen and answered."""
        return self.working_size(picture), self.answer_size(picture)

    def batch_size(self, picture: Picture) -> int:
        """Return how many pictures like this, one that is not large, go into one run of the model."""
        return self._batch_size(self.answer_size(picture))

    def small(self, pictures: Sequence[Picture]) -> list[Result]:
        """Segment pictures of one ``group_key``, none of them large, in one run."""
        seen, size = self.group_key(pictures[0])
        images = np.stack([self._pixels(picture, seen) for picture in pictures])
        answers = self._answer(images, size)
        results = []
        for picture, values in zip(pictures, answers, strict=True):
            if values.ndim == 2:
                labels, probabilities = values, None
            else:
                labels = values.argmax(0).astype(np.uint8)
                probabilities = values.astype(np.float16) if self.settings.probabilities else None
            results.append(Result(_enlarge(labels, picture), probabilities))
        return results

    def large(self, picture: Picture, probabilities: NDArray[np.floating] | None = None) -> Result:
        """Segment a picture tile by tile.

        Args:
            picture: in any mode; tiles are cut from it before they are turned into pixels.
            probabilities: array [C, h, w] of the answer's size to fill, such as a file mapped into memory.
        """
        seen, size = self.group_key(picture)
        source = self._resize(picture, seen) if seen != (picture.height, picture.width) else picture
        tiles = self._tiles(seen)
        rows, columns = (enlarged(parts, side) for parts, side in zip(tiles, size, strict=True))
        seen_rows, seen_columns = (
            dict(zip(answered, parts, strict=True))
            for answered, parts in zip((rows, columns), tiles, strict=True)
        )
        part_size = rows[0].stop, columns[0].stop

        def answer(places: list[tuple[Span, Span]]) -> Answers:
            pixels = [self._tile(source, seen_rows[row], seen_columns[column]) for row, column in places]
            return self._answer(np.stack(pixels), part_size)

        labels = np.empty(size, np.uint8)
        for top, left, values in stitch(rows, columns, answer, self._batch_size(part_size)):
            part = (slice(top, top + values.shape[-2]), slice(left, left + values.shape[-1]))
            labels[part] = values if values.ndim == 2 else values.argmax(0)
            if probabilities is not None:
                probabilities[:, part[0], part[1]] = values
        return Result(_enlarge(labels, picture), probabilities)

    def _tiles(self, seen: Size) -> tuple[list[Span], list[Span]]:
        """Return the rows and the columns of the tiles of a picture that is seen at a size."""
        rows, columns = (spans(side, self.settings.tile, self.settings.shared) for side in seen)
        return rows, columns

    def _batch_size(self, size: Size) -> int:
        """Return how many pictures or tiles, each answered at a size, go into one run."""
        values = len(self.model.metadata.classes) * math.prod(size)
        return max(1, min(self.settings.batch_size, MOST_VALUES // values))

    def _answer(self, images: Pixels, size: Size) -> Answers:
        """Return class ids [B, *size], or probabilities [B, C, *size] where the model has them."""
        if self.model.metadata.output == "labels":
            return self.model.labels(images, size)
        total: Maps | None = None
        for scale in self.settings.scales:
            for flip in (False, True)[: 1 + self.settings.flip]:
                seen = _rescale(images, scale)
                maps = self.model.probabilities(seen[..., ::-1] if flip else seen, size)
                maps = maps[..., ::-1] if flip else maps
                total = maps if total is None else total + maps
        assert total is not None
        return total / (len(self.settings.scales) * (1 + self.settings.flip)) if self.averages else total

    def _pixels(self, picture: Picture, size: Size) -> Pixels:
        """Return a picture as uint8 [channels, *size]."""
        if size != (picture.height, picture.width):
            picture = self._resize(picture, size)
        return to_pixels(picture, self.model.metadata.channels)

    def _resize(self, picture: Picture, size: Size) -> Picture:
        """Return a picture at another size, in the model's channels: not every mode can be resized."""
        if isinstance(picture, Image.Image):
            picture = to_mode(picture, self.model.metadata.channels)
        return picture.resize((size[1], size[0]), Image.Resampling.BILINEAR)

    def _tile(self, source: Picture, row: Span, column: Span) -> Pixels:
        tile = source.crop((column.start, row.start, column.stop, row.stop))
        return to_pixels(tile, self.model.metadata.channels)


def _rescale(images: Pixels, scale: float) -> Pixels:
    """Resize images uint8 [B, channels, H, W]."""
    if scale == 1.0:
        return images
    height, width = (max(1, round(side * scale)) for side in images.shape[2:])
    return np.stack(
        [
            np.stack(
                [
                    np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))
                    for plane in image
                ]
            )
            for image in images
        ]
    )


def _enlarge(labels: Pixels, picture: Picture) -> Pixels:
    """Bring class ids to the picture's size: each pixel takes the nearest."""
    if labels.shape == (picture.height, picture.width):
        return labels
    return np.asarray(Image.fromarray(labels).resize(picture.size, Image.Resampling.NEAREST))
