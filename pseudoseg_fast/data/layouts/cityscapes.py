"""The layout ``cityscapes``: ``leftImg8bit`` and ``gtFine``, by split and city (Cordts et al., CVPR 2016).

Masks are ``labelTrainIds`` where they were made, or else the ``labelIds`` that are distributed, converted when read.
"""

from pathlib import Path

from pseudoseg_fast.data.layouts.tree import Pairs, Tree, class_names, pair, together

EXPECTED = "leftImg8bit/train, leftImg8bit/val, gtFine/train and gtFine/val"
IMAGE_END = "_leftImg8bit"
TRAIN_IDS = "_gtFine_labelTrainIds"
LABEL_IDS = "_gtFine_labelIds"
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""The labelIds of the 19 classes, in the order of their trainIds."""
TO_TRAIN_IDS = dict.fromkeys(range(34), 255) | {number: index for index, number in enumerate(EVALUATED)}


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    return "it has leftImg8bit" if (root / "leftImg8bit").is_dir() else None


def read(root: Path) -> Tree:
    """Return the pictures, 19 classes; those of ``train_extra`` are unlabelled."""
    train, val = _read(root, "train"), _read(root, "val")
    unlabeled = train.unlabeled
    if (root / "leftImg8bit" / "train_extra").is_dir():
        unlabeled = together(root, unlabeled, _read(root, "train_extra", masks=False).unlabeled)
    return Tree(
        train.labeled,
        unlabeled,
        val.labeled,
        unmasked=val.unlabeled,
        classes=class_names("cityscapes"),
        label_map=TO_TRAIN_IDS,
        map_only=f"*{LABEL_IDS}.png",
        image_end=IMAGE_END,
    )


def _read(root: Path, split: str, masks: bool = True) -> Pairs:
    images, ids = root / "leftImg8bit" / split, root / "gtFine" / split
    return pair(root, images, ids if masks else None, IMAGE_END, (TRAIN_IDS, LABEL_IDS))
