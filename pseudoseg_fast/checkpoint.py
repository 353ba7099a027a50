"""Checkpoints: one file with all that a run needs to go on, written whole or not at all, and checked when read.

A checkpoint is the zip archive that ``torch.save`` writes, with the archive's SHA-256 as its comment. So torch and zip
tools read it as any other, and no copy or crash parts the two. Zip's own checksums would not do: they leave out
headers, and torch does not look at them.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from pseudoseg_fast.whole_file import replacing

FORMAT = "pseudoseg_fast checkpoint 2"

# An archive ends with the length of its comment, 0 from torch, and the comment.
NO_COMMENT = b"\0\0"
COMMENT = b"sha256="
COMMENT_LENGTH = (len(COMMENT) + 64).to_bytes(2, "little")
TAIL = len(COMMENT_LENGTH) + len(COMMENT) + 64


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, tensors and plain Python values, to ``path``.

    The file appears under its name only when it is complete and on disk, so a crash leaves the former one intact.

    Raises:
        OSError: the folder cannot be written or the disk is full; the former file is intact.
    """
    with replacing(path) as partial:
        try:
            with partial.open("wb") as file:
                summed = _Summed(file)
                torch.save({"format": FORMAT, **state}, summed)  # type: ignore[arg-type]
                file.seek(-len(NO_COMMENT), os.SEEK_END)
                file.write(_tail(summed.digest))
        except RuntimeError as error:
            # When a write fails torch's zip writer complains of its own state and keeps what the disk said as context.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def load(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running any code that it may hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or no checkpoint of this program.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a checkpoint such as RUN/checkpoints/best.ckpt, found no file {path}"
        )
    if path.suffix == ".onnx":
        raise ValueError(
            f"expected a checkpoint such as RUN/checkpoints/best.ckpt, {path} is an exported model; "
            "python -m pseudoseg_fast.evaluate takes it as --onnx FILE"
        )
    damaged = f"{path} cannot be read as a checkpoint, it is damaged or of another kind:"
    try:
        with path.open("rb") as file:
            found, expected = _tails(file)
            if found != expected and found.startswith(COMMENT_LENGTH + COMMENT):
                raise ValueError("its bytes are not those that its checksum was made of")
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # whose text advises to run what the file may hold
        raise ValueError(
            f"{damaged} it is not an archive of torch.save, or holds more than tensors and plain values"
        ) from error
    except Exception as error:  # torch.load raises whatever its zip and pickle readers raise
        raise ValueError(f"{damaged} {(str(error) or type(error).__name__).splitlines()[0]}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        name = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{path} is not a checkpoint of this program: expected format {FORMAT!r}, found {name!r}"
        )
    if found != expected:
        raise ValueError(
            f"{damaged} there is no checksum at its end, so it was cut short or written by other means"
        )
    return state


class _Summed:
    """A file for ``torch.save``, which writes from the first byte to the last, and the digest of what it is given."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.flush = file.flush
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write all of ``data``."""
        self.digest.update(data)
        return self.file.write(data)


def _tail(digest: Any) -> bytes:
    """Return what stands in place of ``NO_COMMENT`` at the end of an archive with this digest."""
    return COMMENT_LENGTH + COMMENT + digest.hexdigest().encode()


def _tails(file: IO[bytes]) -> tuple[bytes, bytes]:
    """Return the end of the file, and what it would be if the rest is what was written."""
    size = max(0, file.seek(0, os.SEEK_END) - TAIL)
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(min(1 << 20, size - file.tell())):
        digest.update(chunk)
    digest.update(NO_COMMENT)
    return file.read(), _tail(digest)
