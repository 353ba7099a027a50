"""Keep what takes long to find out about a data set: found once, for all processes and the runs to come.

It lies in ``data`` below the folder of the built kernels (``$PSEUDOSEG_CACHE``, or the user's cache folder), never in
the data set's own, which may be read-only. A name holds the hash of what was asked. Files and folders appear whole, by
a rename; of processes that ask together one works and the others wait.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pseudoseg_fast.build.cache import cache_folders, lock, trusted

logger = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]
VERSION = 3
"""Part of every question: to be raised with each change of how any of them is answered."""
SETTLED = 2_000_000_000
"""Nanoseconds after which a file system's clock must show a later change as another time."""
_LEFTOVER_SECONDS = 3600.0
_THREADS = 16
_PART = 1000


def remember(
    kind: str, question: object, fresh: Callable[[Arrays], bool], find: Callable[[], Arrays]
) -> Arrays:
    """Return the arrays that ``find`` found once, as long as they are fresh.

    Args:
        kind: first part of the file's name.
        question: what they answer; its representation is hashed.
        fresh: whether kept arrays still hold.
        find: finds them; what it raises is not kept.
    """
    name = f"{kind}-{_digest(question)}.npz"
    known = next((arrays for folder in _folders() if (arrays := _load(folder / name, fresh))), None)
    if known is not None:
        return known
    with _writable(name) as folder:
        if folder is None:
            return find()
        known = _load(folder / name, fresh)  # another process may have just found them
        if known is None:
            known = find()
            partial = None  # of a name of its own: there may be no lock
            try:
                with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{name}-", delete=False) as file:
                    partial = Path(file.name)
                    np.savez(file, allow_pickle=False, **known)
                os.replace(partial, folder / name)
            except OSError as error:
                if partial is not None:
                    partial.unlink(missing_ok=True)
                logger.warning("%s cannot be kept and will be computed again: %s", kind, error)
        return known


def keep_folder(kind: str, question: object, fill: Callable[[Path], None]) -> Path:
    """Return a folder that ``fill`` filled once.

    Args:
        kind: first part of its name.
        question: what it is made from; its representation is hashed.
        fill: writes into an empty folder; where it raises, nothing is kept.

    Raises:
        OSError: there is no folder to keep it in, or no room.
    """
    name = f"{kind}-{_digest(question)}"
    for known in _folders():
        if os.path.isdir(known / name):  # False where another user forbids to look, too
            return known / name
    with _writable(name) as folder:
        if folder is None:
            raise OSError(f"no folder to keep {kind} in; set PSEUDOSEG_CACHE to a folder that can be written")
        if not (folder / name).is_dir():
            partial = Path(tempfile.mkdtemp(dir=folder, prefix=f".{name}-"))
            try:
                fill(partial)
                partial.rename(folder / name)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                advice = "set PSEUDOSEG_CACHE to a folder with room"
                raise OSError(f"{kind} cannot be kept in {folder}: {error.strerror}; {advice}") from error
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return folder / name


def stamp(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return size and time of change of a file, in nanoseconds; (-1, -1) without one."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def stamps(paths: Sequence[str | os.PathLike[str]]) -> NDArray[np.int64]:
    """Return [N, 2] the stamps of files, asked for in threads: network file systems answer many at a time."""
    parts = [paths[start : start + _PART] for start in range(0, len(paths), _PART)]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [one for part in pool.map(lambda part: [stamp(path) for path in part], parts) for one in part]
    return np.array(found, np.int64).reshape(len(paths), 2)


def _digest(question: object) -> str:
    return hashlib.sha256(repr((VERSION, question)).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _folders() -> list[Path]:
    return [folder / "data" for folder in cache_folders() if trusted(folder)]


def _load(path: Path, fresh: Callable[[Arrays], bool]) -> Arrays | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        return arrays if fresh(arrays) else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


@contextmanager
def _writable(name: str) -> Iterator[Path | None]:
    """Hold the lock of a name in the first folder that can be written; without any, say so and give none."""
    refusals = []
    for parent in cache_folders():
        folder = parent / "data"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not trusted(parent):
                raise PermissionError(f"{parent} belongs to another user or can be written by others")
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            refusals.append(f"{folder}: {error}")
            continue
        with lock(folder / f"{name}.lock"):
            _remove_leftovers(folder, name)
            yield folder
        return
    logger.warning(
        "the index of the data set cannot be kept and will be made again at every start; set PSEUDOSEG_CACHE to a "
        "folder that can be written (%s)",
        "; ".join(refusals),
    )
    yield None


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove what a killed process had begun; what is young may be of one that works without the lock."""
    for path in folder.glob(f".{name}-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
