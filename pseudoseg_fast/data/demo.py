"""The embedded data set: satellite tiles with climate zones (``tools/make_demo_data.py`` builds the archive)."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import shutil
import tempfile
import zipfile
from importlib import resources
from pathlib import Path

logger = logging.getLogger(__name__)


@functools.cache
def demo_root() -> Path:
    """Return the folder of the embedded data set: images/, masks/, splits/, classes.txt and NOTICE.txt.

    The archive is unpacked once into ``$XDG_CACHE_HOME/pseudoseg_fast/demo-HASH`` (``~/.cache`` by default), where HASH
    is of the archive's bytes. Processes that start together do not disturb each other. Where the cache cannot be
    written, a new temporary folder takes its place.

    Raises:
        FileNotFoundError: the package was installed without the archive.
    """
    archive = resources.files(__package__).joinpath("demo.zip").read_bytes()
    name = f"demo-{hashlib.sha256(archive).hexdigest()[:16]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "pseudoseg_fast"
    if (cache / name).is_dir():
        return cache / name
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return _unpack(archive, cache / name)
    except OSError as error:
        target = Path(tempfile.mkdtemp(prefix="pseudoseg_fast-"), name)
        logger.warning("%s cannot be written (%s): the embedded data set goes to %s", cache, error, target)
        return _unpack(archive, target)


def _unpack(archive: bytes, target: Path) -> Path:
    """Unpack beside ``target`` and rename, so that ``target`` is never seen half full."""
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            files.extractall(partial)
        partial.chmod(0o755)
        try:
            partial.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
