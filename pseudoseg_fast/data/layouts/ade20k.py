"""The layout ``ade20k``: the scene parsing benchmark, whose masks count from 1 and have 0 for all else.

Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017 (the folder ``ADEChallengeData2016``).
"""

import dataclasses
from pathlib import Path

from pseudoseg_fast.data.layouts.folder import read_pair
from pseudoseg_fast.data.layouts.tree import Tree, class_names

EXPECTED = "images/training, images/validation, annotations/training and annotations/validation"


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    found = (root / "images" / "training").is_dir() and (root / "annotations" / "training").is_dir()
    return "it has images/training and annotations/training" if found else None


def read(root: Path) -> Tree:
    """Return the pictures, 150 classes; the ids of another number of classes count from 0."""
    tree = read_pair(root, "images", "annotations", "training", "validation")
    return dataclasses.replace(tree, classes=class_names("ade20k"), reduce_zero_label=True)
