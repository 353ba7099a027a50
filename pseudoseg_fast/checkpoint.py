"""Checkpoints: one file with all that a run needs to go on, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

FORMAT = "pseudoseg_fast checkpoint 1"


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write ``state``, tensors and plain Python values, to ``path``.

    The file appears under its name only when it is complete and on disk, so a crash leaves the former one intact.

    Raises:
        OSError: the folder cannot be written or the disk is full; the former file is intact.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
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
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever its zip and pickle readers raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as a checkpoint, it is damaged or of another kind: {reason}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{path} is no checkpoint of this program: expected format {FORMAT!r}, found {found!r}"
        )
    return state
