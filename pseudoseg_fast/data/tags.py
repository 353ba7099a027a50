"""Image-level labels: which classes occur in a picture."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Iterator, Mapping, Sequence, Set
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

    def only(self, names: Set[str]) -> Tags:
        """Return the tags of the named pictures alone."""
        kept = [place for place, name in enumerate(self.names) if name in names]
        if len(kept) == len(self):
            return self
        shown = np.unpackbits(self.shown[kept], axis=1, count=self.classes).astype(bool)
        return Tags([self.names[place] for place in kept], shown)

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
        DataError: the file is missing, empty or no CSV text in UTF-8, lacks a column, repeats a picture, or has a tag
            that is no class.
    """
    path = find_file(path, root)
    rows: dict[str, bytes] = {}
    places = {name: place for place, name in enumerate(classes)}
    lines = _rows(path)
    header = next(lines, (1, []))[1]
    if lacking := {"image", "tags"}.difference(header):
        raise DataError(
            f"{path} has no column {' and no '.join(sorted(lacking))}; expected the header 'image,tags', with columns "
            f"separated by commas, got {','.join(header)!r}"
        )
    columns = header.index("image"), header.index("tags")
    for line, fields in lines:
        where = f"{path}, line {line}"
        if len(fields) > len(header):
            raise DataError(
                f"{where}: expected the {len(header)} columns of the header, got {len(fields)}; separate tags by ;"
            )
        if len(fields) <= max(columns):
            raise DataError(
                f"{where}: expected 'image,tags', got {','.join(fields)[:80]!r}; the line of a picture that shows no "
                "class ends with the comma"
            )
        image, tags = (fields[column] for column in columns)
        image = posixpath.normpath(image)  # ./images/7.jpg is images/7.jpg
        names = {tag.strip() for tag in tags.split(";") if tag.strip()}
        for unknown in sorted(names.difference(classes)):
            raise DataError(f"{where}: {unknown!r} is not a class{nearest(unknown, classes)}")
        if image in rows:
            raise DataError(f"{where}: {image} has tags already; expected one line for each picture")
        shown = bytearray(len(classes))
        for name in names:
            shown[places[name]] = 1
        rows[image] = bytes(shown)
    if not rows:
        raise DataError(f"{path} is empty; expected one picture a line below the header image,tags")
    shown_by_all = np.frombuffer(b"".join(rows.values()), bool).reshape(len(rows), len(classes))
    return Tags(list(rows), shown_by_all)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file, blank ones aside, with the numbers of the lines that they begin in."""
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        line = 1
        try:
            for row in reader:
                fields = [field.strip() for field in row]
                if any(fields):
                    yield line, fields
                line = reader.line_num + 1
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is no UTF-8 text: {error}") from error
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line}: {error}; expected 'image,tags', where quotation marks enclose all of a column, "
                "and those inside are doubled"
            ) from error


def tags_from_masks(samples: Sequence[Sample], labels: Labels) -> Tags:
    """Return the classes that masks show, of pictures that are unlabelled to all else: weak labels, simulated.

    Raises:
        DataError: a mask cannot be used.
    """
    shown = check_masks(samples, labels) > 0
    return Tags([sample.name for sample in samples], shown)
