"""Layouts: how published and home-made data sets arrange pictures and masks in folders.

Each module has ``recognise(root)``, which says why a folder looks like its layout or returns None, and ``read(root)``,
which returns its pictures as a :class:`~pseudoseg_fast.data.layouts.tree.Tree`.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

from pseudoseg_fast.data.layouts import ade20k, cityscapes, coco, folder, labelme, mmseg, voc, yolo
from pseudoseg_fast.data.layouts.tree import Tree
from pseudoseg_fast.data.lists import DataError

LISTS = "lists"
LAYOUTS: dict[str, ModuleType] = {
    "voc": voc,
    "cityscapes": cityscapes,
    "ade20k": ade20k,
    "mmseg": mmseg,
    "coco": coco,
    "yolo": yolo,
    "labelme": labelme,
    "folder": folder,
}
"""In the order in which they are tried: what could be taken for another comes first."""


def read_tree(layout: str, root: Path) -> Tree:
    """Return what a layout finds below ``root``; ``lists`` finds nothing by itself.

    Raises:
        DataError: ``root`` is not arranged so.
    """
    if layout == LISTS:
        return Tree()
    try:
        return LAYOUTS[layout].read(root)
    except DataError as error:
        raise DataError(
            f"layout {layout} expects {LAYOUTS[layout].EXPECTED} in {root}:\n  {error}"
        ) from error


def guess(root: Path, *, lists: bool, complete: bool = False) -> tuple[str, str]:
    """Return the layout that a folder obviously has, and why.

    Args:
        root: the data set's folder.
        lists: the labelled and the val list are given, which is all that the layout ``lists`` needs.
        complete: so is the unlabelled one, so that a folder's own arrangement has nothing to add.

    Raises:
        DataError: no layout is obvious.
    """
    for name, layout in LAYOUTS.items():
        if name == "folder" and complete:
            return LISTS, "the labelled, the unlabelled and the val list are given"
        if why := layout.recognise(root):
            return name, why
    if lists:
        return LISTS, "the labelled and the val list are given"
    inside = [
        child
        for child in (
            *_subfolders(root),
            *(below for above in _subfolders(root) for below in _subfolders(above)),
        )
        if any(layout.recognise(child) for layout in LAYOUTS.values())
    ]
    hint = f"\ndid you mean --data.root {inside[0]}?" if inside else ""
    arranged = "\n".join(f"  {name}: {layout.EXPECTED}" for name, layout in LAYOUTS.items())
    raise DataError(
        f"{root} has none of the layouts that are known; give --data.labeled LIST and --data.val LIST, or arrange it "
        f"as one of these:\n{arranged}{hint}"
    )


def _subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, the hidden ones aside, at most a hundred."""
    try:
        entries = sorted(
            entry.path for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."
        )
    except OSError:
        return []
    return [Path(path) for path in entries[:100]]
