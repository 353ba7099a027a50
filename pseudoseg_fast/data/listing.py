"""What files lie below a folder: walked once, then known until a folder in it changes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from pseudoseg_fast.data.cache import SETTLED, Arrays, remember
from pseudoseg_fast.data.lists import IMAGE_SUFFIXES
from pseudoseg_fast.data.samples import Names

KEPT = 10_000
"""Folders of fewer files are walked each time."""


def list_pictures(folder: Path) -> Names:
    """Return the pictures below a folder, relative to it, with forward slashes, sorted.

    Large folders are walked once for all processes and runs, see :mod:`pseudoseg_fast.data.cache`; what is kept holds
    while none of the folders in it has changed, which adding, removing and renaming files does.
    """
    start = len(str(folder).rstrip(os.sep)) + 1

    def pictures(paths: Iterator[str]) -> Iterator[str]:
        return (
            path[start:].replace(os.sep, "/")
            for path in paths
            if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES
        )

    first = list(islice(walk(folder), KEPT))
    if len(first) < KEPT:
        return Names.of(sorted(pictures(iter(first))))

    def find() -> Arrays:
        began = time.time_ns()
        folders: dict[str, int] = {}
        names = Names.of(sorted(pictures(walk(folder, folders))))
        return {
            "names": names.data,
            "folders": Names.of(folders).data,
            "changed": np.array([*folders.values()], np.int64),
            "began": np.array(began),
        }

    return Names(remember("pictures", str(folder), _unchanged, find)["names"])


def walk(folder: Path, folders: dict[str, int] | None = None) -> Iterator[str]:
    """Yield the paths of the files below a folder, hidden ones aside; links are followed, but not in circles.

    Args:
        folder: where to begin.
        folders: gets the time of change, in nanoseconds, of each folder, as it was before it was read.
    """
    pending = [(str(folder), frozenset[tuple[int, int]]())]
    while pending:
        path, above = pending.pop()
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in above:
            continue
        above |= {(status.st_dev, status.st_ino)}
        if folders is not None:
            folders[path] = status.st_mtime_ns
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    pending.append((entry.path, above))
                elif (
                    entry.is_file() or entry.is_symlink()
                ):  # no pipes; a broken link is a file that cannot be read
                    yield entry.path


def _unchanged(arrays: Arrays) -> bool:
    """Say whether all folders are as they were, and had settled when they were read."""
    changed = arrays["changed"]
    try:
        now = [os.stat(path).st_mtime_ns for path in Names(arrays["folders"])]
    except OSError:
        return False
    return bool(changed.max() < arrays["began"] - SETTLED) and now == changed.tolist()
