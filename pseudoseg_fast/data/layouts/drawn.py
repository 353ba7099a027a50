"""Draw masks from annotation files, one file a picture, into a folder that is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pseudoseg_fast.data.lists import DataError, shorten

DAMAGED = (AttributeError, LookupError, TypeError, ValueError)
"""What annotations that are not as they should be make of the code that reads them; DataError is one of the last."""


def save_masks(folder: Path, names: Sequence[str], draw: Callable[[str], NDArray[np.uint8]]) -> None:
    """Draw masks and save them as PNG.

    Args:
        folder: gets them.
        names: paths of the annotation files, relative to some root, which the masks are named like.
        draw: returns the mask [H, W] of a file of such a name.

    Raises:
        DataError: files cannot be drawn; the message says why of each, up to some.
    """
    problems = []
    for name in tqdm(names, desc="masks", unit="picture", disable=None):
        try:
            mask = draw(name)
        except DAMAGED as error:
            problems.append(f"{name}: {explain(error)}")
            continue
        target = (folder / name).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(target)
    if problems:
        raise DataError(
            f"{len(problems)} annotation files cannot be drawn; mend or remove them:\n{shorten(problems)}"
        )


def explain(error: Exception) -> str:
    """Return the text of an error, with its kind where it is not of this project."""
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
