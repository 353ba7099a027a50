"""Lists of samples and class names: the text files that describe a data set.

A list has one sample a line: an image, and for labelled samples its mask, both relative to the data set's root. Columns
are separated by tabs where a line has one, else by spaces, unless these belong to a picture's name, see
:func:`split_line`. Blank lines and lines that start with ``#`` are skipped. Where a layout has found the pictures, a
line may name one in any way that is plain: an id, a stem, the end of its path.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeAlias, TypeVar

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
_ENDS = tuple(IMAGE_SUFFIXES)
SHOWN = 10
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_T = TypeVar("_T")


class DataError(ValueError):
    """Something is wrong with the files of a data set; the text names the file and the remedy."""


class Member(NamedTuple):
    """A file inside an uncompressed tar file.

    Attributes:
        shard: the tar file.
        name: of the file in it.
        offset: where its bytes begin.
        size: how many there are.
    """

    shard: Path
    name: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        """End of the name, as of a path."""
        return os.path.splitext(self.name)[1]

    def is_file(self) -> bool:
        """Say whether the tar file is there."""
        return self.shard.is_file()

    def read_bytes(self) -> bytes:
        """Return its bytes."""
        data = os.pread(_opened(str(self.shard)).fileno(), self.size, self.offset)
        if len(data) < self.size:
            raise OSError(f"{self.shard} ends within {self.name}; was it replaced?")
        return data

    def __str__(self) -> str:
        return f"{self.shard}/{self.name}"


class Blob(NamedTuple):
    """The bytes of a file that is nowhere on a disk.

    Attributes:
        name: for messages, and for the kind of file.
        data: the bytes.
    """

    name: str
    data: bytes

    @property
    def suffix(self) -> str:
        """End of the name, as of a path."""
        return os.path.splitext(self.name)[1]

    def is_file(self) -> bool:
        """Say that the bytes are there."""
        return True

    def read_bytes(self) -> bytes:
        """Return the bytes."""
        return self.data

    def __str__(self) -> str:
        return self.name


File: TypeAlias = Path | Member | Blob


@functools.lru_cache(maxsize=128)
def _opened(path: str) -> BinaryIO:
    """Return an open file; opening one for each picture would keep a network file system busy with little else."""
    return open(path, "rb", buffering=0)


class Sample(NamedTuple):
    """One picture of a list.

    Attributes:
        name: the image's path relative to the root, with forward slashes.
        image: path of the image file, its place in a tar file, or its bytes.
        mask: path of the mask file, or None for unlabelled samples.
    """

    name: str
    image: File
    mask: Path | None = None


class Index:
    """Finds samples by what published lists call them.

    Args:
        samples: what a layout has found, as often as one goes through it.
        image_end: end of the pictures' stems that lists may leave out.
    """

    def __init__(self, samples: Iterable[Sample] = (), image_end: str = "") -> None:
        self.samples = samples
        self.image_end = image_end

    @functools.cached_property
    def _named(self) -> dict[str, list[tuple[str, Sample]]]:
        """The samples by the last part of their keys; made when first needed, since most lists name whole paths."""
        named: dict[str, list[tuple[str, Sample]]] = defaultdict(list)
        for sample in self.samples:
            key = self._key(sample.name)
            named[key.rpartition("/")[2]].append((f"/{key}", sample))
        return named

    def find(self, text: str) -> list[Sample]:
        """Return the samples that ``text`` may mean: a path, its end, or an id, with suffix or without."""
        for key in dict.fromkeys((text.strip("/"), self._key(text.strip("/")))):
            candidates = self._named.get(key.rpartition("/")[2], [])
            if found := [sample for path, sample in candidates if path.endswith(f"/{key}")]:
                return found
        return []

    def _key(self, name: str) -> str:
        return (os.path.splitext(name)[0] if is_image(name) else name).removesuffix(self.image_end)


def is_image(name: str) -> bool:
    """Say whether a name ends as those of the pictures and masks do that are read."""
    return name.lower().endswith(_ENDS)


def read_list(
    path: str | Path,
    root: str | Path,
    masks: Literal["required", "optional", "ignored"] = "required",
    index: Index | None = None,
) -> list[Sample]:
    """Read a list of samples and check that every file it names exists.

    Args:
        path: the list, relative to the working directory or else to ``root``.
        root: folder that the list's paths are relative to and must not leave; a leading slash means the root, too.
        masks: ``"required"`` wants a mask for each picture, from the second column or from ``index``; ``"optional"``
            takes those that there are; ``"ignored"`` wants none and neither reads nor checks a second column: an
            unlabelled picture needs no mask file.
        index: what a layout has found. Pictures that are no path below the root, and masks that a line does not name
            or that are not there, are looked up in it.

    Raises:
        DataError: the list is missing or empty, lacks a mask, leaves the root, or names missing files.
    """
    if masks not in ("required", "optional", "ignored"):
        raise ValueError(f"masks must be 'required', 'optional' or 'ignored', got {masks!r}")
    root = Path(os.path.abspath(root))
    path = find_file(path, root)
    index = index or Index()
    samples: list[Sample] = []
    missing: list[str] = []
    replaced = 0
    for number, line in read_lines(path):
        where = f"{path}, line {number}"
        sample, mask = _read_line(line, root, index, where)
        sample = (
            sample._replace(mask=None)
            if masks == "ignored"
            else _with_mask(sample, mask, root, index, where, masks)
        )
        replaced += mask is not None and sample.mask is not None and sample.mask != _inside(root, mask, where)
        missing += [f"line {number}: {file}" for file in sample[1:] if file and not file.is_file()]
        samples.append(sample)
    if missing:
        no_layout = next(iter(index.samples), None) is None
        raise DataError(
            f"missing files in {path}: {len(missing)}; expected 'image mask' or 'image' a line, with a tab between the "
            f"two where names have spaces, and paths relative to the root {root}"
            f"{' (bare ids need a --data.layout)' if no_layout else ', or names that the layout knows'}:\n"
            f"{shorten(missing)}"
        )
    if not samples:
        raise DataError(f"{path} is empty; expected one sample a line")
    if replaced:
        logger.info("%s: %d masks are not there; those of the layout take their place", path, replaced)
    return samples


def read_classes(path: str | Path, root: str | Path | None = None) -> list[str]:
    """Read class names, one a line in the order of the mask ids from 0.

    Raises:
        DataError: the file is missing or empty, a name occurs twice, or there are more than the 255 that an 8-bit mask
            with 255 = ignored can hold.
    """
    path = find_file(path, root)
    names = [line.strip() for _, line in read_lines(path)]
    if (start := _numbered(names, r"\s")) is not None:
        logger.warning(
            "%s: the names of the classes have numbers, from %d, that count as parts of them", path, start
        )
    if (start := _numbered(names, r"\s*[:;,)]|\.\s")) is not None:
        raise DataError(
            f"{path} numbers its classes, {names[0]!r} first; expected names alone, one a line in the order of the "
            "mask ids from 0"
            + (
                "; where ids in the masks count from 1 and 0 means no label, give --data.reduce_zero_label true, too, "
                "else put background first"
                if start
                else ""
            )
        )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path} names a class twice: {', '.join(repeated)}")
    if not 1 <= len(names) <= 255:
        raise DataError(
            f"{path} names {len(names)} classes; expected 1 to 255, one a line in the order of the mask ids"
        )
    return names


def _numbered(names: Sequence[str], end: str) -> int | None:
    """Return 0 or 1 where every name begins with its own number, counted from there, as in "0: road"; else None.

    Args:
        names: of the classes.
        end: regular expression of what comes after a number.
    """
    found = [re.match(rf"(\d+)(?:{end})\s*\S", name) for name in names]
    numbers = [int(match[1]) for match in found if match]
    for start in (0, 1):
        if len(names) > 1 and numbers == [*range(start, start + len(names))]:
            return start
    return None


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


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines, without blank lines and comments."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 text: {error}") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if (content := line.lstrip()) and not content.startswith("#"):
            yield number, line


def split_line(line: str, find: Callable[[str], _T]) -> tuple[_T, list[str]]:
    """Return what the picture that a line of a list names is found as, and the line's columns, that picture's first.

    Without a tab a space may be part of a name: the line as a whole counts, if that is a picture. Else its first word
    does, but only where the other words look like columns, as files, paths, ids and numbers do: ``photo (1).jpg`` must
    not become a picture ``photo``. A line that is neither is one column, for messages to show.

    Args:
        line: what the list has.
        find: returns something true where a text names a picture, or another file that is known.
    """
    if "\t" in line:
        columns = [column for column in map(str.strip, line.split("\t")) if column]
        return find(columns[0]), columns
    words = line.split()
    first = words[0]
    if len(words) == 1:
        return find(first), words
    pair = len(words) == 2 and is_image(first)
    # What lies in a folder "a.jpg masks" is no picture, and to look for it takes long where lines are many.
    if pair and "/" in words[1] and (found := find(first)):
        return found, words
    whole = line.strip()
    found = find(whole)
    if not found and (pair or _are_columns(words[1:], find)) and (alone := find(first)):
        return alone, words[:2]
    return found, [whole]


def _are_columns(words: Sequence[str], find: Callable[[str], object]) -> bool:
    """Say whether words are more likely columns than parts of a name."""
    return all("/" in word or _NUMBER.fullmatch(word) or find(word) for word in words)


def _read_line(line: str, root: Path, index: Index, where: str) -> tuple[Sample, str | None]:
    """Return the sample of a line, without its mask where the line has a path, and the text of its second column.

    A picture that is missing is one without a file.
    """
    found, columns = split_line(line, functools.partial(_find, root, index))
    text = columns[0]
    if len(columns) > 2:
        raise DataError(
            f"{where}: expected 'image mask' or 'image', got {len(columns)} columns in {line.strip()!r}"
        )
    if len(found) > 1:
        raise DataError(
            f"{where}: {text} may be {', '.join(sample.name for sample in found[:3])}; expected more of its path"
        )
    if not found:
        found = [_sample(root, _inside(root, text, where))]
        _inside(root, text.split()[0], where)  # of an image and a mask that are both elsewhere
    return found[0], columns[1] if len(columns) == 2 else None


def _find(root: Path, index: Index, text: str) -> list[Sample]:
    """Return the samples that a text may mean: the file below the root alone, or else those of the index."""
    path = _below(root, text)
    return [_sample(root, path)] if path is not None and path.is_file() else index.find(text)


def _sample(root: Path, path: Path) -> Sample:
    return Sample(path.relative_to(root).as_posix(), path)


def _with_mask(sample: Sample, mask: str | None, root: Path, index: Index, where: str, masks: str) -> Sample:
    """Return the sample with the mask that its line names, or the layout's where it names none or a missing one."""
    named = _inside(root, mask, where) if mask else None
    if named is None or not named.is_file():
        known = sample.mask or next((found.mask for found in index.find(sample.name)), None)
        named = known or named
    if named is None and masks == "required" and sample.image.is_file():
        raise DataError(
            f"{where}: expected 'image mask', got only {sample.name!r}; a labelled list needs both, or a "
            "--data.layout that knows the mask of each picture"
        )
    return sample._replace(mask=named)


def _inside(root: Path, text: str, where: str) -> Path:
    """Return the file that ``text`` names below ``root``; links are followed, ``..`` must not lead out."""
    path = _below(root, text)
    if path is None:
        raise DataError(f"{where}: {text} leaves the root {root}; expected a path relative to it")
    return path


def _below(root: Path, text: str) -> Path | None:
    """Return the file that ``text`` names below ``root``, or None where it names one elsewhere."""
    path = Path(os.path.normpath(os.path.join(root, text)))
    if path.is_relative_to(root):
        return path
    # Many published lists begin their paths with a slash; what such a path names may be missing.
    path = Path(os.path.normpath(root / text.lstrip("/")))
    below = text.startswith("/") and path.is_relative_to(root)
    return path if below and (path.exists() or not os.path.exists(text)) else None
