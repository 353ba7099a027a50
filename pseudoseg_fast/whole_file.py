"""Files that appear under their name whole and on disk, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def partial_name(path: Path) -> Path:
    """Return where ``path`` grows: one name for all its versions, so what a kill leaves, the next one overwrites."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; what is there at the end takes the place of ``path``.

    A crash at any moment leaves the former file. The bytes are on disk before they have the name ``path``, and the name
    is on disk when this returns. The folder is made where it is missing.

    Raises:
        OSError: the folder cannot be written or the disk is full; the former file is intact.
    """
    partial = partial_name(path)
    try:
        make_folder(path.parent)
        yield partial
        _sync(partial)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            reason = f"{error.strerror}; nothing that was there before is lost"
            raise OSError(error.errno, reason, str(path)) from error
        raise


def replace_text(path: Path, text: str) -> None:
    """Make ``text`` the content of ``path``, see :func:`replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def replace_by_link(path: Path, source: Path) -> None:
    """Make ``path`` another name of ``source``, or a copy of it where the file system has one name per file.

    Raises:
        OSError: see :func:`replacing`.
    """
    with replacing(path) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            with source.open("rb") as file, partial.open("wb") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)


def make_folder(folder: Path) -> None:
    """Make ``folder`` and what is missing above it, and bring their names to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a folder, where the file system has no such thing
            raise
    finally:
        os.close(handle)
