"""The layout ``voc``: JPEGImages, SegmentationClass, and the ids of each set in ImageSets/Segmentation.

Everingham et al., The PASCAL Visual Object Classes Challenge; SegmentationClassAug are the masks of Hariharan et al.,
ICCV 2011, in the form in which everybody uses them. Masks are palette or grey PNGs of ids.
"""

from pathlib import Path

from pseudoseg_fast.data.layouts.tree import Tree, class_names, first_folder, prefix, stems
from pseudoseg_fast.data.lists import DataError, Sample, read_lines, shorten

EXPECTED = (
    "JPEGImages, SegmentationClass or SegmentationClassAug, ImageSets/Segmentation/train.txt and val.txt"
)
LISTS = Path("ImageSets", "Segmentation")
AUGMENTED = ("trainaug.txt", "train_aug.txt")


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    return "it has JPEGImages" if (root / "JPEGImages").is_dir() else None


def read(root: Path) -> Tree:
    """Return the pictures: labelled are those of train.txt, unlabelled the others of trainaug.txt.

    Without a trainaug.txt the unlabelled pictures are all that are in neither train.txt nor val.txt.
    """
    images = root / "JPEGImages"
    pictures = stems(images)
    folder = first_folder(root, "SegmentationClass", "SegmentationClassAug")
    masks = _masks(folder) if folder else {}
    if (root / "SegmentationClassAug").is_dir():
        masks |= _masks(root / "SegmentationClassAug")
    train, val = (_ids(root / LISTS / f"{name}.txt") for name in ("train", "val"))
    augmented = next((root / LISTS / name for name in AUGMENTED if (root / LISTS / name).is_file()), None)
    known = {*train, *val}
    others = [name for name in (_ids(augmented) if augmented else sorted(pictures)) if name not in known]
    if missing := [name for name in [*train, *val, *others] if name not in pictures]:
        raise DataError(
            f"{len(missing)} ids of {root / LISTS} have no picture in {images}:\n{shorten(missing)}"
        )
    if missing := [name for name in [*train, *val] if name not in masks]:
        raise DataError(
            f"{len(missing)} ids of train.txt and val.txt have no mask in {folder or root / 'SegmentationClass'}:\n"
            f"{shorten(missing)}"
        )

    def sample(name: str) -> Sample:
        return Sample(f"{prefix(root, images)}{pictures[name]}", images / pictures[name], masks.get(name))

    # What val.txt leaves to nobody's list keeps its mask: a list of one's own may call for it.
    return Tree(
        [sample(name) for name in train],
        [sample(name) for name in others],
        [sample(name) for name in val],
        sorted(path for name, path in masks.items() if name not in pictures),
        classes=class_names("voc"),
    )


def _masks(folder: Path) -> dict[str, Path]:
    return {stem: folder / name for stem, name in stems(folder).items()}


def _ids(path: Path) -> list[str]:
    """Return the ids of a list, one a line; a second column is not for segmentation and is left out."""
    if not path.is_file():
        return []
    return [line.split()[0] for _, line in read_lines(path)]
