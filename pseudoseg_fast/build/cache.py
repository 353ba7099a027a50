"""Find a native library, or build it once for all processes and keep it.

A library is looked for in the installed package first, then in the cache. The cache is ``$PSEUDOSEG_CACHE``, by
default ``pseudoseg_fast`` in the user's cache folder, and behind it a private folder under the system's temporary
folder for homes that cannot be written. In it each key has a folder; the key is the hash of sources, headers,
flags and platform, then that of compiler, C library and torch.

A build runs in a fresh folder and ends in one atomic rename, so a reader sees a whole library or none. The lock
only saves work: it belongs to a process, not to the file, so it dies with its holder, and a builder that cannot
have it builds all the same.
"""

import contextlib
import logging
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from .compile import compile_library
from .errors import REMEDY, BuildError
from .spec import Spec
from .toolchain import Toolchain, find_toolchain

logger = logging.getLogger(__name__)

PACKAGED = Path(__file__).resolve().parents[1] / "_native"
"""Where setup.py and CMake put libraries that are built ahead of time."""

_LOCK_SECONDS = 600.0
_LEFTOVER_SECONDS = 3600.0


@dataclass(frozen=True)
class Library:
    """A library file and where it came from."""

    path: Path
    origin: Literal["packaged", "cached"]


def cache_folders() -> list[Path]:
    """Return the folders that may hold built libraries, in order of preference; none need exist."""
    folders = []
    given = os.environ.get("PSEUDOSEG_CACHE")
    if given:
        folders.append(Path(given).expanduser().absolute())
    else:
        with contextlib.suppress(RuntimeError):  # no home folder
            folders.append(_user_cache() / "pseudoseg_fast")
    if sys.platform != "win32":
        folders.append(_private_folder())
    return folders


def find(spec: Spec) -> Library | None:
    """Return the library if it is packaged or cached; build nothing and write nothing.

    Where there is no compiler, a library that any compiler made from the same sources and flags will do.
    """
    packaged = PACKAGED / spec.filename
    if packaged.is_file():
        return Library(packaged, "packaged")
    digest = spec.digest()
    try:
        pattern = f"{digest}-{find_toolchain(spec).key(spec)}"
    except BuildError:
        pattern = f"{digest}-*"
    for folder in filter(trusted, cache_folders()):
        for path in sorted(folder.glob(f"{pattern}/{spec.filename}")):
            return Library(path, "cached")
    return None


def ensure(spec: Spec) -> Library:
    """Return the library, building it if it is neither packaged nor cached.

    Raises:
        BuildError: it is not there and cannot be built.
    """
    found = find(spec)
    if found is not None:
        return found
    toolchain = find_toolchain(spec)
    key = f"{spec.digest()}-{toolchain.key(spec)}"
    refusals = []
    for folder in cache_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not trusted(folder):
                raise PermissionError(f"{folder} belongs to another user or can be written by others")
            return Library(_build(spec, toolchain, folder / key), "cached")
        except OSError as error:
            refusals.append(f"{folder}: {error}")
    listed = "\n".join(refusals)
    raise BuildError(
        f"no folder to keep the built {spec.name} in:\n{listed}\n"
        f"Set PSEUDOSEG_CACHE to a folder that can be written, {REMEDY}"
    )


def _build(spec: Spec, toolchain: Toolchain, home: Path) -> Path:
    """Build the library into the folder `home` of its key, unless another process just did."""
    home.mkdir(exist_ok=True)
    target = home / spec.filename
    with lock(home / "lock"):
        if target.is_file():
            return target
        _remove_leftovers(home)
        with tempfile.TemporaryDirectory(prefix="build-", dir=home, ignore_cleanup_errors=True) as work:
            long = "a minute or two" if spec.architectures else "some seconds"
            _announce(f"building {spec.name} with {toolchain.version} into {home} (once, takes {long})")
            _publish(compile_library(spec, toolchain, Path(work)), target)
    return target


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the builder's lock, or go on without it where the file system has none or its holder hangs."""
    lock = FileLock(path, timeout=_LOCK_SECONDS)
    try:
        lock.acquire()
    except (Timeout, NotImplementedError, OSError) as error:
        logger.debug("building without the lock %s: %s", path, error)
    try:
        yield
    finally:
        lock.release()


def _publish(built: Path, target: Path) -> None:
    """Move a finished library into place: its bytes first reach the disk, then its name appears."""
    with built.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(built, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_leftovers(home: Path) -> None:
    """Remove the folders of builders that were killed; a young one may belong to a builder without a lock."""
    for folder in home.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > _LEFTOVER_SECONDS:
                shutil.rmtree(folder)


def _private_folder() -> Path:
    """Return this user's folder in the temporary folder that all users share."""
    return Path(tempfile.gettempdir()).absolute() / f"pseudoseg_fast-{os.getuid()}"


def trusted(folder: Path) -> bool:
    """Tell whether only this user can have put files there; asked of the folder under the shared one alone."""
    if sys.platform == "win32" or folder != _private_folder():
        return True
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o022


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


def _announce(message: str) -> None:
    """Log a message at INFO; write it to standard error where logging would drop it."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info(message)
    else:
        print(f"pseudoseg_fast: {message}", file=sys.stderr, flush=True)
