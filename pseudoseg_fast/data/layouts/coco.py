"""The layout ``coco``: ``train2017`` and ``val2017`` (or below ``images``), 80 things and the background.

Lin et al., Microsoft COCO, ECCV 2014. Masks are the first of these that is there, by split or in one folder:

- ``masks``: ids 0 to 80, as semi-supervised repositories distribute them;
- ``stuffthingmaps``: the PNGs of COCO-Stuff (Caesar et al., CVPR 2018), which hold the category id less one; things
  become the 80 classes, stuff the background, and what has no label stays ignored;
- ``annotations``: PNGs of ids, such as the ``_labelTrainIds`` that mmsegmentation makes.
"""

from pathlib import Path

from pseudoseg_fast.data.layouts.tree import Tree, class_names, first_folder, pair, split_labeled
from pseudoseg_fast.data.lists import DataError, Sample

EXPECTED = "train2017, val2017 and masks below masks/, stuffthingmaps/ or annotations/"
YEARS = ("2017", "2014")
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Numbers below 91 that are no category."""
THINGS = tuple(number for number in range(1, 91) if number not in UNUSED)
"""The category ids of the 80 things, in the order of their classes from 1."""
STUFF = range(91, 183)
FROM_STUFF = {number - 1: 0 for number in STUFF} | {
    number - 1: index for index, number in enumerate(THINGS, 1)
}
MASK_ENDS = ("", "_labelTrainIds")


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    found = _folder(root, "train")
    return None if found is None else f"it has {found.relative_to(root).as_posix()}"


def read(root: Path) -> Tree:
    """Return the pictures, 81 classes unless the masks come from ``annotations``, whose classes nobody can tell."""
    train = _folder(root, "train")
    if train is None:
        raise DataError(f"no folder {root / 'train2017'} nor {root / 'images' / 'train2017'}")
    val = _folder(root, "val")
    labeled, unlabeled = split_labeled(_read(root, train))
    more = [folder for folder in [first_folder(root, "unlabeled2017", "images/unlabeled2017")] if folder]
    unlabeled += [sample for folder in more for sample in _read(root, folder)]
    held_out = split_labeled(_read(root, val))[0] if val else []
    masks = _masks(root)
    return Tree(
        labeled,
        unlabeled,
        held_out,
        classes=None if masks and masks.name == "annotations" else class_names("coco"),
        label_map=FROM_STUFF,
        map_only="*/stuffthingmaps/*",
    )


def _folder(root: Path, split: str) -> Path | None:
    return first_folder(root, *(f"{above}{split}{year}" for year in YEARS for above in ("", "images/")))


def _masks(root: Path) -> Path | None:
    return first_folder(root, "masks", "stuffthingmaps", "annotations")


def _read(root: Path, images: Path) -> list[Sample]:
    masks = _masks(root)
    if masks is not None and (masks / images.name).is_dir():
        masks = masks / images.name
    return pair(root, images, masks, mask_ends=MASK_ENDS)[0]
