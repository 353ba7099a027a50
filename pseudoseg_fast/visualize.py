"""Pictures for people: label maps in colour, grids with a legend, and the demo's map."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pseudoseg_fast.data.decode import open_whole
from pseudoseg_fast.data.lists import Sample

if TYPE_CHECKING:  # predict has no yaml
    from pseudoseg_fast.data.labels import Labels

Pixels = NDArray[np.uint8]

COLORS = (
    (38, 104, 184),
    (24, 132, 72),
    (240, 196, 64),
    (226, 104, 56),
    (136, 84, 176),
    (196, 226, 240),
    (214, 39, 40),
    (140, 86, 75),
    (227, 119, 194),
    (23, 190, 207),
    (188, 189, 34),
    (255, 152, 150),
    (94, 60, 153),
    (166, 206, 227),
    (178, 223, 138),
    (253, 191, 111),
    (202, 178, 214),
    (105, 105, 105),
    (51, 160, 44),
    (177, 89, 40),
)
IGNORED = (255, 255, 255)
MARGIN = 8
TEXT = 14
TILE = 96


def palette(classes: int, background: int | None = None) -> Pixels:
    """Return the colours of ``classes`` classes as uint8 [classes, 3]; the background class is black.

    Up to twenty are hand-picked; further ones are drawn from a fixed seed.
    """
    drawn = np.random.default_rng(0).integers(32, 256, (max(0, classes - len(COLORS)), 3))
    colors = np.concatenate([np.array(COLORS), drawn])[:classes].astype(np.uint8)
    if background is not None:
        colors = np.insert(colors, background, 0, axis=0)[:classes]
    return colors


def mask_palette(mask: Path | None, labels: Labels, background: int | None = None) -> Pixels:
    """Return the colours that a mask brings, if they tell the classes apart; else :func:`palette`.

    Args:
        mask: a file, whose palette counts unless ``labels`` has a map of colours.
        labels: what its values mean.
        background: id of the class that is black in :func:`palette`.
    """
    colors = [] if mask is None else labels.colors(mask)
    if colors and None not in colors and len(set(colors)) == len(colors):
        return np.array(colors, np.uint8)
    return palette(labels.classes, background)


def colorize(labels: Pixels, colors: Pixels) -> Pixels:
    """Return uint8 [H, W, 3] for class ids uint8 [H, W]; ids without a colour, such as 255, are white."""
    table = np.full((256, 3), IGNORED, np.uint8)
    table[: len(colors)] = colors
    return table[labels]


def as_color(image: Pixels) -> Pixels:
    """Return uint8 [H, W, 3] for a picture [H, W, C]: its first three channels, or the first as grey."""
    return image[..., :3] if image.shape[2] >= 3 else np.repeat(image[..., :1], 3, axis=2)


def blend(image: Pixels, color: Pixels, opacity: float) -> Pixels:
    """Lay ``color`` over ``image``, both uint8 [H, W, 3]."""
    return np.round(image * (1 - opacity) + color * opacity).astype(np.uint8)


def grey(values: NDArray[np.float32]) -> Pixels:
    """Return uint8 [H, W, 3] from black to white for values [H, W] in 0..1."""
    return np.repeat(np.round(255 * values).astype(np.uint8)[..., None], 3, axis=2)


def activation(image: Pixels, strength: NDArray[np.float32], labels: Pixels, colors: Pixels) -> Pixels:
    """Lay classes over a picture, dimmed and without its colours, as opaque as they are strong.

    Args:
        image: uint8 [H, W, 3].
        strength: [H, W] in 0..1.
        labels: class ids, uint8 [H, W].
        colors: uint8 [C, 3].
    """
    dimmed = np.repeat(image.mean(axis=2, keepdims=True) / 2, 3, axis=2)
    opacity = strength[..., None]
    return np.round(dimmed * (1 - opacity) + colorize(labels, colors) * opacity).astype(np.uint8)


def font(size: int = TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own font, which needs no file."""
    return ImageFont.load_default(size)


def grid(
    rows: Sequence[Sequence[Pixels]],
    titles: Sequence[str],
    names: Sequence[str],
    colors: Pixels,
    cell: int = 192,
) -> Image.Image:
    """Put pictures uint8 [H, W, 3] into a grid with a title over each column and a legend below.

    Args:
        rows: pictures of a row, one per title.
        titles: of the columns.
        names: of the classes, for the legend.
        colors: uint8 [classes, 3].
        cell: the longer side of a picture in the grid, in pixels.
    """
    cells = [[_fit(picture, cell) for picture in row] for row in rows]
    height = max(picture.height for row in cells for picture in row)
    width = max(picture.width for row in cells for picture in row)
    body = len(cells) * (height + MARGIN)
    total = len(titles) * (width + MARGIN) + MARGIN
    key = legend(names, colors, total)
    sheet = Image.new("RGB", (total, TEXT + 3 * MARGIN + body + key.height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        left = MARGIN + column * (width + MARGIN)
        draw.text((left, MARGIN), title, "black", font())
        for row, pictures in enumerate(cells):
            sheet.paste(pictures[column], (left, TEXT + 2 * MARGIN + row * (height + MARGIN)))
    sheet.paste(key, (0, sheet.height - key.height))
    return sheet


def legend(names: Sequence[str], colors: Pixels, width: int) -> Image.Image:
    """Draw a coloured square beside each class name, in as many lines as ``width`` pixels need."""
    places: list[tuple[int, int]] = []
    left, top = MARGIN, MARGIN
    for name in names:
        length = TEXT + MARGIN // 2 + int(font().getlength(name)) + 2 * MARGIN
        if left > MARGIN and left + length > width:
            left, top = MARGIN, top + TEXT + MARGIN
        places.append((left, top))
        left += length
    key = Image.new("RGB", (width, top + TEXT + MARGIN), "white")
    draw = ImageDraw.Draw(key)
    for name, color, (left, top) in zip(names, colors, places, strict=True):
        draw.rectangle((left, top, left + TEXT, top + TEXT), tuple(color.tolist()), "black")
        draw.text((left + TEXT + MARGIN // 2, top), name, "black", font())
    return key


def tile_map(
    val: Sequence[Sample],
    predictions: Mapping[str, Pixels],
    others: Sequence[Sample],
    names: Sequence[str],
    colors: Pixels,
) -> Image.Image:
    """Put the demo's tiles back on the map, twice: val tiles under their true and under their predicted zones.

    Args:
        val: the val tiles, shown in colour.
        predictions: class ids uint8 [H, W] of each val tile, by name.
        others: the training tiles, shown dimmed.
        names: of the classes.
        colors: uint8 [classes, 3].
    """
    shrink = 4
    side = TILE // shrink
    rows, columns = zip(*(tile_position(sample.name) for sample in [*val, *others]), strict=True)
    top, left = min(rows), min(columns)
    size = ((max(columns) - left) // shrink + side, (max(rows) - top) // shrink + side)
    panels = []
    for predicted in (False, True):
        panel = Image.new("RGB", size, (12, 22, 44))
        for sample in [*others, *val]:
            with open_whole(sample.image) as image:
                tile = np.array(image.convert("RGB"))
            if sample.name in predictions and sample.mask:
                with Image.open(sample.mask) as mask:
                    labels = predictions[sample.name] if predicted else np.array(mask)
                tile = blend(tile, colorize(labels, colors), 0.7)
            else:
                tile = blend(tile, np.zeros_like(tile), 0.6)
            row, column = tile_position(sample.name)
            place = ((column - left) // shrink, (row - top) // shrink)
            panel.paste(Image.fromarray(tile).resize((side, side), Image.Resampling.BOX), place)
        panels.append(np.array(panel))
    columns_of = [[panels[0]], [panels[1]]]
    return grid(
        columns_of, ["held-out tiles: true zones above, predicted zones below"], names, colors, size[0]
    )


def tile_position(name: str) -> tuple[int, int]:
    """Return row and column of a demo tile's upper left pixel on the map, from its file name."""
    found = re.search(r"r(\d+)_c(\d+)", name)
    if found is None:
        raise ValueError(f"a tile of the demo is named r0150_c0864, after its place on the map; got {name}")
    return int(found.group(1)), int(found.group(2))


def _fit(picture: Pixels, side: int) -> Image.Image:
    image = Image.fromarray(picture)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST)
