"""The layout ``mmseg``: ``img_dir/{train,val}`` and ``ann_dir/{train,val}``, as mmsegmentation wants custom data."""

from pathlib import Path

from pseudoseg_fast.data.layouts.folder import read_pair
from pseudoseg_fast.data.layouts.tree import Tree

EXPECTED = "img_dir/train, img_dir/val and masks of the same names below ann_dir/"


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    return (
        "it has img_dir and ann_dir"
        if all((root / name).is_dir() for name in ("img_dir", "ann_dir"))
        else None
    )


def read(root: Path) -> Tree:
    """Return the pictures below ``img_dir`` with the masks below ``ann_dir``."""
    return read_pair(root, "img_dir", "ann_dir")
