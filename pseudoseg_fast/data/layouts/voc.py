"""The layout ``voc``: JPEGImages, SegmentationClass, and the ids of each set in ImageSets/Segmentation.

Everingham et al., The PASCAL Visual Object Classes Challenge; SegmentationClassAug are the masks of Hariharan et al.,
ICCV 2011, in the form in which everybody uses them. Masks are palette or grey PNGs of ids.
"""

from collections.abc import Container
from pathlib import Path

from pseudoseg_fast.data.layouts.tree import Tree, class_names, pictures, prefix, stems
from pseudoseg_fast.data.lists import DataError, Sample, read_lines, shorten, split_line

EXPECTED = (
    "JPEGImages, SegmentationClass or SegmentationClassAug, ImageSets/Segmentation/train.txt and val.txt"
)
LISTS = Path("ImageSets", "Segmentation")
AUGMENTED = ("trainaug.txt", "train_aug.txt")
MASKS = ("SegmentationClass", "SegmentationClassAug")
"""The latter count where both have a mask."""


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    return "it has JPEGImages" if (root / "JPEGImages").is_dir() else None


def read(root: Path) -> Tree:
    """Return the pictures: labelled are those of train.txt, unlabelled the others of trainaug.txt.

    Without a trainaug.txt the unlabelled pictures are all that are in neither train.txt nor val.txt.
    """
    images = root / "JPEGImages"
    files = stems(images, pictures(images))
    folders = [root / name for name in MASKS if (root / name).is_dir()]
    masks = {
        stem: folder / name for folder in folders for stem, name in stems(folder, pictures(folder)).items()
    }
    train, val = (_ids(root / LISTS / f"{name}.txt", files) for name in ("train", "val"))
    augmented = next((root / LISTS / name for name in AUGMENTED if (root / LISTS / name).is_file()), None)
    known = {*train, *val}
    others = [name for name in (_ids(augmented, files) if augmented else sorted(files)) if name not in known]
    if missing := [name for name in [*train, *val, *others] if name not in files]:
        raise DataError(
            f"{len(missing)} ids of {root / LISTS} have no picture in {images}:\n{shorten(missing)}"
        )
    if missing := [name for name in [*train, *val] if name not in masks]:
        raise DataError(
            f"{len(missing)} ids of train.txt and val.txt have no mask in {(folders or [root / MASKS[0]])[0]}:\n"
            f"{shorten(missing)}"
        )

    def sample(name: str) -> Sample:
        return Sample(f"{prefix(root, images)}{files[name]}", images / files[name], masks.get(name))

    # What val.txt leaves to nobody's list keeps its mask: a list of one's own may call for it.
    return Tree(
        [sample(name) for name in train],
        [sample(name) for name in others],
        [sample(name) for name in val],
        sorted(path for name, path in masks.items() if name not in files),
        classes=class_names("voc"),
    )


def _ids(path: Path, known: Container[str]) -> list[str]:
    """Return the ids of a list, one a line; further columns are not for segmentation and are left out."""
    if not path.is_file():
        return []
    return [split_line(line, known.__contains__)[1][0] for _, line in read_lines(path)]
