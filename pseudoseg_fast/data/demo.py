"""The embedded data set: satellite tiles with climate zones (``tools/make_demo_data.py`` builds the archive)."""

from __future__ import annotations

import functools
import hashlib
import io
import zipfile
from importlib import resources
from pathlib import Path

from pseudoseg_fast.data.cache import keep_folder


@functools.cache
def demo_root() -> Path:
    """Return the folder of the embedded data set: images/, masks/, splits/, classes.txt and NOTICE.txt.

    The archive is unpacked once for all processes and runs, see :mod:`pseudoseg_fast.data.cache`.

    Raises:
        FileNotFoundError: the package was installed without the archive.
        OSError: there is no folder to unpack it in.
    """
    archive = resources.files(__package__).joinpath("demo.zip").read_bytes()

    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            files.extractall(folder)

    return keep_folder("demo", hashlib.sha256(archive).hexdigest(), unpack)
