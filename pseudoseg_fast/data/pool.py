"""The unlabelled pictures: a list, a folder, or tar shards, of any number."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import numpy as np

from pseudoseg_fast.data.cache import SETTLED, Arrays, remember, stamp
from pseudoseg_fast.data.listing import KEPT, list_pictures
from pseudoseg_fast.data.lists import (
    IMAGE_SUFFIXES,
    DataError,
    Index,
    Sample,
    find_file,
    is_image,
    read_lines,
    read_list,
    split_line,
)
from pseudoseg_fast.data.samples import Names, Samples
from pseudoseg_fast.data.shards import ShardSamples, are_remote, are_shards, expand, read_shards
from pseudoseg_fast.data.stream import Stream

_LISTED = 100
Pool: TypeAlias = Samples | ShardSamples | Stream


class _NotPlain(Exception):
    """A line of a list needs more than its text."""


def read_unlabeled(
    path: str | Path, root: str | Path, index: Index | None = None, size: int | None = None
) -> Pool:
    """Read unlabelled samples from a list, or take every picture of tar shards or below a folder, sorted by path.

    Long lists and large folders are checked once for all processes and runs, see :mod:`pseudoseg_fast.data.cache`: a
    list until it changes, a folder until one in it does. A picture of a checked list that is gone later is skipped and
    counted in training, as a damaged one is.

    Args:
        path: a list, a folder, or shards such as pool-{000..099}.tar, relative to the working directory or else to
            ``root``; or URLs of shards.
        root: the data set's root.
        index: as for :func:`~pseudoseg_fast.data.lists.read_list`.
        size: number of pictures in shards behind URLs or pipes.

    Raises:
        DataError: as :func:`~pseudoseg_fast.data.lists.read_list`, or the folder holds no picture;
            or as :func:`~pseudoseg_fast.data.shards.read_shards`.
    """
    root = Path(os.path.abspath(root))
    for folder in (Path(path), root / path):
        if folder.is_dir():
            return _read_folder(Path(os.path.abspath(folder)), root)
    if are_remote(path):
        if size is None:
            raise DataError(
                f"{path} is a stream of unknown length; give the number of its pictures, "
                "--data.unlabeled_size N"
            )
        return Stream([url for part in str(path).split("::") for url in expand(part)], size)
    if are_shards(path):
        return read_shards(path, root)
    path = Path(os.path.abspath(find_file(path, root)))
    if stamp(path)[0] > KEPT:  # bytes: no more lines than that
        try:
            return Samples(root, _read_plain(path, root))
        except _NotPlain:
            pass
    return pack(root, read_list(path, root, "ignored", index))


def is_folder(path: str | Path, root: Path) -> bool:
    """Say whether :func:`read_unlabeled` takes a path for a folder."""
    return Path(path).is_dir() or (root / path).is_dir()


def pack(root: Path, samples: list[Sample]) -> Samples:
    """Return samples below a root without their masks."""
    return Samples(root, Names.of(sample.name for sample in samples))


def _read_folder(folder: Path, root: Path) -> Samples:
    """Return the pictures below ``folder``, named relative to ``root`` where they lie inside it."""
    names = list_pictures(folder)
    if not names:
        raise DataError(f"{folder} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if folder == root or not folder.is_relative_to(root):
        return Samples(folder, names)
    above = folder.relative_to(root).as_posix()
    return Samples(root, Names.of(f"{above}/{name}" for name in names))


def _read_plain(path: Path, root: Path) -> Names:
    """Return the pictures of a list of paths below ``root``, all of which are there.

    Raises:
        _NotPlain: a line is something else; what, :func:`read_list` finds out.
    """
    size, changed = stamp(path)

    def find() -> Arrays:
        began = time.time_ns()
        files = _Files(root)
        names = []
        for _, line in read_lines(path):
            # A set answers three times as fast as a method that looks further, and nearly all lines need no more.
            found, columns = split_line(line, files.listed.__contains__)
            if not found:
                found, columns = split_line(line, files.find)
            if not found or len(columns) > 2:
                raise _NotPlain
            names.append(columns[0])
        return {"names": Names.of(names).data, "began": np.array(began)}

    def fresh(arrays: Arrays) -> bool:
        return bool(changed < arrays["began"] - SETTLED)

    question = (str(path), size, changed, str(root))
    return Names(remember("names", question, fresh, find)["names"])


class _Files:
    """The pictures below a root, by their plain relative paths.

    A folder that is asked for often is listed, since a network file system takes long to answer for each file.

    Attributes:
        listed: the pictures of these folders.
    """

    def __init__(self, root: Path) -> None:
        self.listed: set[str] = set()
        self._root = root
        self._asked: Counter[str] = Counter()

    def find(self, name: str) -> bool:
        """Say whether a file has a name that cannot be written otherwise."""
        above = name[: name.rfind("/") + 1]
        if above and (above.startswith(("/", "..")) or f"{os.path.normpath(above)}/" != above):
            return False
        self._asked[above] += 1
        if self._asked[above] == _LISTED:
            with suppress(OSError):
                self.listed.update(
                    [above + each for each in os.listdir(self._root / above) if is_image(each)]
                )
        if self._asked[above] >= _LISTED and is_image(name):
            return name in self.listed
        return os.path.isfile(self._root / name)
