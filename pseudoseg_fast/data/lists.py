"""Lists of samples, class names and image tags: the text files that describe a data set.

A list has one sample a line: an image, and for labelled samples its mask, both relative to the data set's root. Columns
are separated by tabs where a line has one, else by spaces. Blank lines and lines that start with ``#`` are skipped.
"""

from __future__ import annotations

import csv
import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
SHOWN = 10


class DataError(ValueError):
    """Something is wrong with the files of a data set; the text names the file and the remedy."""


class Sample(NamedTuple):
    """One picture of a list.

    Attributes:
        name: the image's path relative to the root, with forward slashes.
        image: path of the image file.
        mask: path of the mask file, or None for unlabelled samples.
    """

    name: str
    image: Path
    mask: Path | None = None


def read_list(
    path: str | Path, root: str | Path, masks: Literal["required", "ignored"] = "required"
) -> list[Sample]:
    """Read a list of samples and check that every file it names exists.

    Args:
        path: the list, relative to the working directory or else to ``root``.
        root: folder that the list's paths are relative to and must not leave.
        masks: ``"required"`` wants two columns, ``image mask``; ``"ignored"`` wants one and neither reads nor checks a
            second: an unlabelled picture needs no mask file.

    Raises:
        DataError: the list is missing or empty, lacks the mask column, leaves the root, or names missing files.
    """
    if masks not in ("required", "ignored"):
        raise ValueError(f"masks must be 'required' or 'ignored', got {masks!r}")
    root = Path(os.path.abspath(root))
    path = find_file(path, root)
    samples: list[Sample] = []
    missing: list[str] = []
    for number, line in _lines(path):
        image, mask = _columns(line, masks, where=f"{path}, line {number}")
        files = [_inside(root, text, where=f"{path}, line {number}") for text in (image, mask) if text]
        missing += [f"line {number}: {file}" for file in files if not file.is_file()]
        samples.append(Sample(files[0].relative_to(root).as_posix(), files[0], files[1] if mask else None))
    if missing:
        raise DataError(
            f"missing files in {path}: {len(missing)}; its paths are relative to the root {root}, "
            f"and names with spaces need tabs between the columns:\n{shorten(missing)}"
        )
    if not samples:
        raise DataError(f"{path} is empty; expected one sample a line")
    return samples


def read_unlabeled(path: str | Path, root: str | Path) -> list[Sample]:
    """Read unlabelled samples from a list, or take every picture below a folder, sorted by path.

    Args:
        path: a list or a folder, relative to the working directory or else to ``root``.
        root: the data set's root.

    Raises:
        DataError: as :func:`read_list`, or the folder holds no picture.
    """
    root = Path(os.path.abspath(root))
    for folder in (Path(path), root / path):
        if folder.is_dir():
            return _read_folder(Path(os.path.abspath(folder)), root)
    return read_list(path, root, masks="ignored")


def read_classes(path: str | Path, root: str | Path | None = None) -> list[str]:
    """Read class names, one a line in the order of the mask ids from 0.

    Raises:
        DataError: the file is missing or empty, a name occurs twice, or there are more than the 255 that an 8-bit mask
            with 255 = ignored can hold.
    """
    path = find_file(path, root)
    names = [line.strip() for _, line in _lines(path)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} names a class twice: {', '.join(repeated)}")
    if not 1 <= len(names) <= 255:
        raise DataError(
            f"{path} names {len(names)} classes; expected 1 to 255, one a line in the order of the mask ids"
        )
    return names


def read_tags(
    path: str | Path, classes: Sequence[str], root: str | Path | None = None
) -> dict[str, set[str]]:
    """Read image-level labels: a CSV file with the columns ``image`` and ``tags``, tags separated by ``;``.

    Returns:
        The classes of each picture by its name, the path relative to the root.

    Raises:
        DataError: the file is missing or empty, lacks a column, repeats a picture, or has a tag that is no class.
    """
    path = find_file(path, root)
    tags: dict[str, set[str]] = {}
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
            if row["image"] in tags:
                raise DataError(
                    f"{where}: {row['image']} has tags already; expected one line for each picture"
                )
            tags[row["image"]] = names
    if not tags:
        raise DataError(f"{path} is empty; expected one picture a line below the header image,tags")
    return tags


def find_file(path: str | Path, root: str | Path | None = None) -> Path:
    """Return ``path`` as given, or else below ``root``.

    Raises:
        DataError: neither is a file.
    """
    tried = [Path(path)] if root is None else [Path(path), Path(root) / path]
    for candidate in tried:
        if candidate.is_file():
            return candidate
    places = dict.fromkeys(os.path.abspath(candidate) for candidate in tried)
    folder = " (a folder is there)" if any(candidate.is_dir() for candidate in tried) else ""
    raise DataError(f"no file at {' nor at '.join(places)}{folder}")


def nearest(word: str, words: Sequence[str]) -> str:
    """Return the end of an error text: the nearest of ``words``, or all of them when none is near."""
    near = difflib.get_close_matches(word.lower(), words, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(words)}"


def shorten(problems: Sequence[str], shown: int = SHOWN) -> str:
    """Return the first problems one a line, and the number of the rest."""
    rest = [f"... and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n".join(f"  {problem}" for problem in [*problems[:shown], *rest])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines, without blank lines and comments."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.lstrip().startswith("#"):
            yield number, line


def _columns(line: str, masks: str, where: str) -> tuple[str, str | None]:
    """Split a line into image and mask; the mask is None when masks are ignored."""
    columns = [column.strip() for column in line.split("\t")] if "\t" in line else line.split()
    columns = [column for column in columns if column]
    if len(columns) > 2:
        raise DataError(
            f"{where}: expected 'image mask' or 'image', got {len(columns)} columns in {line.strip()!r}; "
            "separate the columns by a tab when names have spaces, and end a single one with a tab"
        )
    if masks == "ignored":
        return columns[0], None
    if len(columns) < 2:
        raise DataError(f"{where}: expected 'image mask', got {line.strip()!r}; a labelled list needs both")
    return columns[0], columns[1]


def _inside(root: Path, text: str, where: str) -> Path:
    """Return the file that ``text`` names below ``root``; links are followed, ``..`` must not lead out."""
    path = Path(os.path.normpath(root / text))
    if not path.is_relative_to(root):
        raise DataError(f"{where}: {text} leaves the root {root}; expected a path relative to it")
    return path


def _read_folder(folder: Path, root: Path) -> list[Sample]:
    """Return the pictures below ``folder``, named relative to ``root`` where they lie inside it."""
    base = root if folder.is_relative_to(root) else folder
    files = (Path(parent, name) for parent, _, names in os.walk(folder, followlinks=True) for name in names)
    images = [
        file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    ]
    if not images:
        raise DataError(f"{folder} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(Sample(image.relative_to(base).as_posix(), image) for image in images)
