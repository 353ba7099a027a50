"""Segment pictures of any size with a model: sizes of training, test-time augmentation, tiles (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pseudoseg_fast.data.decode import to_mode
from pseudoseg_fast.deploy.model import Maps, Model, Pixels
from pseudoseg_fast.deploy.pictures import Picture, to_pixels
from pseudoseg_fast.deploy.tiles import Answers, Span, check_tiles, spans, stitch

Size = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """How pictures are segmented.

    Args:
        flip: average with the answer to the mirrored picture.
        scales: average the answers to the picture at these sizes.
        tile: pictures larger than this many pixels on a side are cut into tiles of at most this side.
        overlap: pixels that neighbouring tiles share at least.
        batch_size: pictures or tiles in one run of the model.
        short_side: resize pictures first so that their shorter side has this many pixels; None: never.
        probabilities: answer them, not only class ids.

    Raises:
        ValueError: a value is out of its range.
    """

    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    tile: int = 1024
    overlap: int = 128
    batch_size: int = 4
    short_side: int | None = None
    probabilities: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range."""
        check_tiles(self.tile, self.overlap)
        if not self.scales or not all(0.1 <= scale <= 4 for scale in self.scales):
            raise ValueError(
                f"--scales expects factors from 0.1 to 4, got {' '.join(map(str, self.scales)) or 'none'}"
            )
        if self.batch_size < 1:
            raise ValueError(f"--batch-size expects at least 1, got {self.batch_size}")
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(f"--short-side expects at least 1 pixel, got {self.short_side}")


@dataclass
class Result:
    """What a picture was found to show.

    Attributes:
        labels: class ids uint8 [H, W], at the picture's size.
        probabilities: [C, h, w] in 0..1, or None unless asked for; at the picture's size, but for a picture that was
            shrunk to ``short_side`` and is larger than a tile, at the shrunken one.
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
        height, width = picture.height, picture.width
        short_side = self.settings.short_side
        if short_side is None:
            return height, width
        # As in training: the longer side is rounded down.
        if height <= width:
            return short_side, max(1, int(short_side * width / height))
        return max(1, int(short_side * height / width)), short_side

    def is_large(self, picture: Picture) -> bool:
        """Tell whether a picture is cut into tiles."""
        return max(self.working_size(picture)) > self.settings.tile

    def group_key(self, picture: Picture) -> tuple[Size, Size]:
        """Return what pictures of one batch have in common: the sizes at which they are seen and answered."""
        seen = self.working_size(picture)
        full = picture.height, picture.width
        limit = max(self.settings.tile**2, seen[0] * seen[1])
        return seen, full if full[0] * full[1] <= limit else seen

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
                probabilities = values if self.settings.probabilities else None
            results.append(Result(_enlarge(labels, picture), probabilities))
        return results

    def large(self, picture: Picture, probabilities: NDArray[np.floating] | None = None) -> Result:
        """Segment a picture tile by tile.

        Args:
            picture: in any mode; tiles are cut from it before they are turned into pixels.
            probabilities: array [C, h, w] of the working size to fill, such as a file mapped into memory.
        """
        settings = self.settings
        seen = self.working_size(picture)
        source = self._resize(picture, seen) if seen != (picture.height, picture.width) else picture
        rows, columns = (spans(side, settings.tile, settings.overlap) for side in seen)

        def answer(places: list[tuple[Span, Span]]) -> Answers:
            tiles = np.stack([self._tile(source, row, column) for row, column in places])
            return self._answer(tiles, tiles.shape[2:])

        labels = np.empty(seen, np.uint8)
        for top, left, values in stitch(rows, columns, answer, settings.batch_size):
            part = (slice(top, top + values.shape[-2]), slice(left, left + values.shape[-1]))
            labels[part] = values if values.ndim == 2 else values.argmax(0)
            if probabilities is not None:
                probabilities[:, part[0], part[1]] = values
        return Result(_enlarge(labels, picture), probabilities)

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
