"""The layout ``coco``: ``train2017`` and ``val2017`` (or below ``images``), 80 things and the background.

Lin et al., Microsoft COCO, ECCV 2014. Masks are the first of these that is there, by split or in one folder:

- ``masks``: ids 0 to 80, as semi-supervised repositories distribute them; of folders without a year, anybody's ids;
- ``stuffthingmaps``: the PNGs of COCO-Stuff (Caesar et al., CVPR 2018), which hold the category id less one; things
  become the 80 classes, stuff the background, and what has no label stays ignored;
- ``annotations/train2017``, or PNGs in ``annotations``: ids, such as the ``_labelTrainIds`` that mmsegmentation makes;
- ``annotations/panoptic_train2017.json`` with its folder of PNGs, beside it or below the root;
- ``annotations/instances_train2017.json``, or ``_annotations.coco.json`` in the folder of the pictures, as Roboflow has
  it, whose val pictures are in ``valid``.

The last two may be of anybody's classes: the file names them (:mod:`~pseudoseg_fast.data.layouts.coco_json`), and the
folders may be called ``train`` and ``val``. Pictures that it lists without an annotation get masks where the classes
are COCO's own, and none otherwise.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from pseudoseg_fast.data.layouts import coco_json
from pseudoseg_fast.data.layouts.tree import Pairs, Tree, class_names, first_folder, pair, together
from pseudoseg_fast.data.lists import DataError, Sample

logger = logging.getLogger(__name__)

EXPECTED = (
    "train2017, val2017 and masks below masks/ or stuffthingmaps/, or in annotations/ as PNGs, panoptic_*.json or "
    "instances_*.json; or Roboflow's train and valid, each with its _annotations.coco.json"
)
YEARS = ("2017", "2014", "")
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
"""Numbers below 91 that are no category."""
THINGS = tuple(number for number in range(1, 91) if number not in UNUSED)
"""The category ids of the 80 things, in the order of their classes from 1."""
STUFF = range(91, 183)
FROM_STUFF = {number - 1: 0 for number in STUFF} | {
    number - 1: index for index, number in enumerate(THINGS, 1)
}
MASK_ENDS = ("_labelTrainIds", "")
ANNOTATIONS = "annotations"
STUFF_MAPS = "stuffthingmaps"
EXPORTED = "_annotations.coco.json"


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    found = _folder(root, "train")
    return None if found is None else f"it has {found.relative_to(root).as_posix()}"


def read(root: Path) -> Tree:
    """Return the pictures, 81 classes unless an annotation file says otherwise; nobody can tell those of other PNGs."""
    train = _folder(root, "train")
    if train is None:
        raise DataError(f"no folder {root / 'train2017'} nor {root / 'images' / 'train2017'}")
    val = _folder(root, "val") or _folder(root, "valid")
    known, classes = _read(root, train)
    held_out, val_classes = _read(root, val) if val else (Pairs(), None)
    if classes and val_classes and known.labeled and held_out.labeled and classes != val_classes:
        raise DataError(
            f"the annotation files of {train.name} and {val.name if val else ''} name other classes"
        )
    unlabeled = known.unlabeled
    if more := first_folder(root, "unlabeled2017", "images/unlabeled2017"):
        unlabeled = together(root, unlabeled, pair(root, more, None).unlabeled)
    return Tree(
        known.labeled,
        unlabeled,
        held_out.labeled,
        unmasked=held_out.unlabeled,
        classes=classes if known.labeled or not val_classes else val_classes,
        drawn=_is_drawn(root, [*known.labeled, *held_out.labeled]),
        label_map=FROM_STUFF if (root / STUFF_MAPS).is_dir() else {},
        map_only=f"*/{STUFF_MAPS}/*",
    )


def _is_drawn(root: Path, samples: Sequence[Sample]) -> bool:
    """Say whether the masks are drawn from annotation files, and so not below the root."""
    return any(sample.mask is not None and root not in sample.mask.parents for sample in samples)


def _folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split's pictures.

    One without a year needs an annotation file to tell, and no masks of its name: those are of the layout ``folder``.
    """
    for year in YEARS:
        found = first_folder(root, f"{split}{year}", f"images/{split}{year}")
        annotated = found and any(
            file.is_file() for file in (_instances(root, found), _file(root, "panoptic", found))
        )
        if found and (year or (annotated and not (root / "masks" / split).is_dir())):
            return found
    return None


def _file(root: Path, kind: str, images: Path) -> Path:
    return root / ANNOTATIONS / f"{kind}_{images.name}.json"


def _instances(root: Path, images: Path) -> Path:
    """Return where the instances of a split are annotated, or would be."""
    exported = images / EXPORTED
    return exported if exported.is_file() else _file(root, "instances", images)


def _read(root: Path, images: Path) -> tuple[Pairs, list[str] | None]:
    """Return the pictures of a split and the names of the classes, where they are known."""
    masks, classes = _masks(root, images)
    return pair(root, images, masks, mask_ends=MASK_ENDS), classes


def _masks(root: Path, images: Path) -> tuple[Path | None, list[str] | None]:
    """Return the folder of a split's masks, drawn where need be, and the names of their classes."""
    for name in ("masks", STUFF_MAPS):
        if found := first_folder(root, f"{name}/{images.name}", name):
            return found, class_names("coco") if images.name.endswith(YEARS[:-1]) else None
    annotations = root / ANNOTATIONS
    if (annotations / images.name).is_dir():
        return annotations / images.name, None
    if any(annotations.glob("*.png")):
        return annotations, None
    segments = first_folder(root, f"{ANNOTATIONS}/panoptic_{images.name}", f"panoptic_{images.name}")
    instances, panoptic = _instances(root, images), _file(root, "panoptic", images)
    if segments and panoptic.is_file():
        source, drawn = panoptic, coco_json.panoptic_masks(panoptic, segments, images)
    elif instances.is_file():
        source, drawn = instances, coco_json.instance_masks(instances, images)
    else:
        return None, class_names("coco")
    logger.info("masks of %s: those of %s, in %s", images.name, source, drawn.folder)
    if bare := drawn.listed - drawn.annotated:
        logger.info(
            "%d of the %d pictures that %s lists have no annotation: %s",
            bare,
            drawn.listed,
            source,
            "they show background alone, as COCO means it"
            if drawn.drawn > drawn.annotated
            else "they are taken for pictures that nobody has looked at yet, and get no mask; where one shows "
            "background alone, annotate any part of it with a category called background",
        )
    return drawn.folder, drawn.classes
