"""The files below a folder (nothing beyond the standard library, for those who run without the rest)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


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
                elif entry.is_file() or entry.is_symlink():  # a broken link cannot be read; no pipes
                    yield entry.path
