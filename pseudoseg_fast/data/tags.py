"""Image-level labels: which classes occur in a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import DataError, Sample, find_file, nearest
from pseudoseg_fast.data.read import check_masks
from pseudoseg_fast.data.samples import Names

FROM_MASKS = "masks"
_CHUNK = 1 << 16  # pictures that are counted at a time


class Tags(Mapping[str, tuple[int, ...]]):
    """The class ids that pictures are tagged with, by the pictures' names, in little memory.

    Args:
        names: of the pictures, each once.
        shown: [N, C] whether a picture shows a class.
    """

    def __init__(self, names: Sequence[str] = (), shown: NDArray[np.bool_] | None = None) -> None:
        order = sorted(range(len(names)), key=names.__getitem__)
        self.names = Names.of(names[index] for index in order)
        shown = np.zeros((0, 0), bool) if shown is None else shown
        self.classes = shown.shape[1]
        self.shown = np.packbits(shown[order], axis=1)

    def __getitem__(self, name: str) -> tuple[int, ...]:
        low, high = 0, len(self.names)
        while low < high:
            middle = (low + high) // 2
            found = self.names[middle]
            if found == name:
                return tuple(np.flatnonzero(np.unpackbits(self.shown[middle], count=self.classes)).tolist())
            low, high = (middle + 1, high) if found < name else (low, middle)
        raise KeyError(name)

    def shares(self) -> list[float]:
        """Return the share of the pictures that shows each of the C classes."""
        counts = np.zeros(self.classes, np.int64)
        for start in range(0, len(self), _CHUNK):
            counts += np.unpackbits(self.shown[start : start + _CHUNK], axis=1, count=self.classes).sum(
                0, np.int64
            )
        return [float(share) for share in counts / max(1, len(self))]

    def without_classes(self) -> list[str]:
        """Return the names of the pictures that show no class."""
        return [self.names[int(index)] for index in np.flatnonzero(~self.shown.any(1))]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)


def read_tags(path: str | Path, classes: Sequence[str], root: str | Path | None = None) -> Tags:
    """Read image-level labels: a CSV file with the columns ``image`` and ``tags``, tags separated by ``;``.

    Returns:
        The classes of each picture by its name, the path relative to the root.

    Raises:
        DataError: the file is missing or empty, lacks a column, repeats a picture, or has a tag that is no class.
    """
    path = find_file(path, root)
    rows: dict[str, bytes] = {}
    places = {name: place for place, name in enumerate(classes)}
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        if lacking := {"image", "tags"}.difference(reader.fieldnames or ()):
            raise DataError(
                f"{path} has no column {' and no '.join(sorted(lacking))}; expected the header 'image,tags', "
                f"got {','.join(reader.fieldnames or ())!r}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(
                    f"{where}: expected two columns, got {len(row) + 1} or more; separate tags by ;"
                )
            names = {tag.strip() for tag in (row["tags"] or "").split(";") if tag.strip()}
            for unknown in sorted(names.difference(classes)):
                raise DataError(f"{where}: {unknown!r} is no class{nearest(unknown, classes)}")
            if row["image"] in rows:
                raise DataError(
                    f"{where}: {row['image']} has tags already; expected one line for each picture"
                )
            shown = bytearray(len(classes))
            for name in names:
                shown[places[name]] = 1
            rows[row["image"]] = bytes(shown)
    if not rows:
        raise DataError(f"{path} is empty; expected one picture a line below the header image,tags")
    shown_by_all = np.frombuffer(b"".join(rows.values()), bool).reshape(len(rows), len(classes))
    return Tags(list(rows), shown_by_all)


def tags_from_masks(samples: Sequence[Sample], labels: Labels) -> Tags:
    """Return the classes that masks show, of pictures that are unlabelled to all else: weak labels, simulated.

    Raises:
        DataError: a mask cannot be used.
    """
    shown = check_masks(samples, labels) > 0
    return Tags([sample.name for sample in samples], shown)
