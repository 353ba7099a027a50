"""The layout ``voc``: JPEGImages, SegmentationClass, and the ids of each set in ImageSets/Segmentation.

Everingham et al., The PASCAL Visual Object Classes Challenge; SegmentationClassAug are the masks of Hariharan et al.,
ICCV 2011, in the form in which everybody uses them. Masks are palette or grey PNGs of ids.

CVAT exports its "Segmentation mask" in the same folders, with a labelmap.txt of classes and their colours, masks of
these colours, and lists by the names of its subsets, default.txt without any.
"""

from __future__ import annotations

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
LABEL_MAP = "labelmap.txt"
SUBSETS = {"train": ("train", "default"), "val": ("val", "validation")}
"""Names of CVAT's subsets, in small letters, of training and of val pictures; those of others are left out."""


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    if (root / LABEL_MAP).is_file() and (root / MASKS[0]).is_dir():
        return f"it has {MASKS[0]} and {LABEL_MAP}"
    return "it has JPEGImages" if (root / "JPEGImages").is_dir() else None


def read(root: Path) -> Tree:
    """Return the pictures: labelled are those of train.txt, unlabelled the others of trainaug.txt.

    Without a trainaug.txt the unlabelled pictures are all that are in neither train.txt nor val.txt. In an export of
    CVAT they are those without a mask.
    """
    images = root / "JPEGImages"
    exported = (root / LABEL_MAP).is_file()
    if exported and not images.is_dir():
        raise DataError(
            f"there is no folder {images}: export with the pictures (Save images), or put them there"
        )
    files = stems(images, pictures(images))
    folders = [root / name for name in MASKS if (root / name).is_dir()]
    masks = {
        stem: folder / name for folder in folders for stem, name in stems(folder, pictures(folder)).items()
    }
    lists = (
        _subsets(root) if exported else {name: [root / LISTS / f"{name}.txt"] for name in ("train", "val")}
    )
    train, val = ([name for path in lists[kind] for name in _ids(path, files)] for kind in ("train", "val"))
    unmasked: list[str] = []
    if exported:  # which lists what nobody has drawn on yet, too
        train = [name for name in train if name in masks]
        unmasked = [name for name in val if name in files and name not in masks]
        val = [name for name in val if name not in unmasked]
    augmented = next((root / LISTS / name for name in AUGMENTED if (root / LISTS / name).is_file()), None)
    known = {
        *train,
        *val,
        *unmasked,
        *(name for path in lists.get("other", ()) for name in _ids(path, files)),
    }
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

    colors = read_label_map_of_colors(root / LABEL_MAP) if exported else {}
    # What val.txt leaves to nobody's list keeps its mask: a list of one's own may call for it.
    return Tree(
        [sample(name) for name in train],
        [sample(name) for name in others],
        [sample(name) for name in val],
        sorted(path for name, path in masks.items() if name not in files),
        unmasked=[sample(name) for name in unmasked],
        classes=list(colors) if exported else class_names("voc"),
        colors=colors,
    )


def read_label_map_of_colors(path: Path) -> dict[str, tuple[int, int, int]]:
    """Return the colour of each class of a file with lines "name:r,g,b:parts:actions", in its order.

    Raises:
        DataError: a line is none such, or a class or colour comes twice.
    """
    colors: dict[str, tuple[int, int, int]] = {}
    for number, line in read_lines(path):
        name, *rest = line.strip().split(":")
        numbers = rest[0].split(",") if rest else []
        if not (name and len(numbers) == 3 and all(part.strip().isdigit() for part in numbers)):
            raise DataError(f"{path}, line {number}: expected name:r,g,b:parts:actions, got {line.strip()!r}")
        red, green, blue = map(int, numbers)
        if max(red, green, blue) > 255:
            raise DataError(f"{path}, line {number}: colours are 0 to 255, got {line.strip()!r}")
        if name in colors or (red, green, blue) in colors.values():
            raise DataError(f"{path}, line {number}: class or colour comes twice: {line.strip()!r}")
        colors[name] = red, green, blue
    if not colors:
        raise DataError(f"{path} is empty; expected a line name:r,g,b:parts:actions for each class")
    return colors


def _subsets(root: Path) -> dict[str, list[Path]]:
    """Return the lists of an export by what they are for; "other" are those of other subsets, such as Test."""
    lists: dict[str, list[Path]] = {"train": [], "val": [], "other": []}
    for path in sorted((root / LISTS).glob("*.txt")):
        if path.name in (*AUGMENTED, "trainval.txt"):
            continue
        kinds = [kind for kind, names in SUBSETS.items() if path.stem.lower() in names]
        lists[kinds[0] if kinds else "other"].append(path)
    return lists


def _ids(path: Path, known: Container[str]) -> list[str]:
    """Return the ids of a list, one a line; further columns are not for segmentation and are left out."""
    if not path.is_file():
        return []
    return [split_line(line, known.__contains__)[1][0] for _, line in read_lines(path)]
