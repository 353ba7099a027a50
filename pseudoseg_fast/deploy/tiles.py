"""Cut large pictures into overlapping tiles and put the answers together in bounded memory (no torch)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Answers = NDArray[Any]


class Span(NamedTuple):
    """One tile's extent along a side, in pixels."""

    start: int
    stop: int


class Block(NamedTuple):
    """A finished part of the whole answer.

    Attributes:
        top, left: its place.
        values: class ids [h, w], or probabilities [C, h, w].
    """

    top: int
    left: int
    values: Answers


Answer = Callable[[list[tuple[Span, Span]]], Answers]
"""From rows and columns of some tiles, all of one size, to class ids [n, h, w] or probabilities [n, C, h, w]."""


def check_tiles(tile: int, overlap: int) -> None:
    """Raise ValueError unless tiles are at least 32 pixels and overlap by at most a quarter.

    So no more than two tiles meet at any pixel of a side.
    """
    if tile < 32:
        raise ValueError(f"--tile expects tiles of at least 32 pixels, got {tile}")
    if not 0 <= overlap <= tile // 4:
        raise ValueError(
            f"--overlap expects 0 to a quarter of --tile {tile}, which is {tile // 4} pixels, got {overlap}"
        )


def spans(length: int, tile: int, overlap: int) -> list[Span]:
    """Cover a side by the fewest tiles of one length, at most ``tile``, that overlap by ``overlap`` or more."""
    if length <= tile:
        return [Span(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    side = math.ceil((length + (count - 1) * overlap) / count)
    starts = [round(index * (length - side) / (count - 1)) for index in range(count)]
    return [Span(start, start + side) for start in starts]


def enlarged(parts: Sequence[Span], length: int) -> list[Span]:
    """Return the places of tiles in an answer of another, larger size.

    Args:
        parts: from :func:`spans`.
        length: of the answer's side.
    """
    if len(parts) == 1:
        return [Span(0, length)]
    side = math.ceil((parts[0].stop - parts[0].start) * length / parts[-1].stop)
    starts = [round(index * (length - side) / (len(parts) - 1)) for index in range(len(parts))]
    return [Span(start, start + side) for start in starts]


def ramps(parts: Sequence[Span]) -> list[NDArray[np.float32]]:
    """Return the weights of each tile along its side: 1, falling linearly where it meets a neighbour, in sum 1."""
    weights = []
    for index, part in enumerate(parts):
        weight = np.ones(part.stop - part.start, np.float32)
        if index > 0 and (shared := parts[index - 1].stop - part.start) > 0:
            weight[:shared] = (np.arange(shared) + 0.5) / shared
        if index + 1 < len(parts) and (shared := part.stop - parts[index + 1].start) > 0:
            weight[-shared:] = 1 - (np.arange(shared) + 0.5) / shared
        weights.append(weight)
    return weights


def stitch(rows: Sequence[Span], columns: Sequence[Span], answer: Answer, batch: int) -> Iterator[Block]:
    """Yield the whole answer in blocks that tile the picture, from the answers of its tiles.

    Probabilities are averaged where tiles meet, with weights that fall towards a tile's edge; a pixel's class id is
    that of the tile whose edge is farther. Held at a time are ``batch`` tiles, and of probabilities the rows that two
    rows of tiles share, [C, overlap, W] twice.
    """
    row_weights, column_weights = ramps(rows), ramps(columns)
    above: Answers | None = None
    for row, part in enumerate(rows):
        following = rows[row + 1].start if row + 1 < len(rows) else part.stop
        below: list[Answers] = []
        left: Answers | None = None
        for column, values in enumerate(_row_of_tiles(part, columns, answer, batch)):
            if values.ndim == 2:
                yield _own_part(values, rows, row, columns, column)
                continue
            here = columns[column]
            next_left = columns[column + 1].start if column + 1 < len(columns) else here.stop
            values = values * (row_weights[row][:, None] * column_weights[column])
            if left is not None:
                values[:, :, : left.shape[2]] += left
            left = values[:, :, next_left - here.start :].copy()
            block = values[:, :, : next_left - here.start]
            if above is not None:
                block[:, : above.shape[1]] += above[:, :, here.start : next_left]
            below.append(block[:, following - part.start :].copy())
            yield Block(part.start, here.start, block[:, : following - part.start])
        above = np.concatenate(below, axis=2) if below else None


def _row_of_tiles(row: Span, columns: Sequence[Span], answer: Answer, batch: int) -> Iterator[Answers]:
    for first in range(0, len(columns), batch):
        yield from answer([(row, column) for column in columns[first : first + batch]])


def _own_part(values: Answers, rows: Sequence[Span], row: int, columns: Sequence[Span], column: int) -> Block:
    """Cut a tile in the middle of what it shares with its neighbours."""
    top, bottom = _own_span(rows, row)
    left, right = _own_span(columns, column)
    first, second = rows[row].start, columns[column].start
    return Block(top, left, values[top - first : bottom - first, left - second : right - second])


def _own_span(parts: Sequence[Span], index: int) -> Span:
    start, stop = parts[index]
    if index > 0:
        start = (start + parts[index - 1].stop) // 2
    if index + 1 < len(parts):
        stop = (stop + parts[index + 1].start) // 2
    return Span(start, stop)
