"""The layout ``yolo``: pictures, text files of outlines and a YAML file of names, as Ultralytics segments.

``images/{train,val}`` and ``labels/{train,val}``, or ``{train,val}/{images,labels}`` (``valid`` will do, as Roboflow
has it). A line of a label file is a class and the outline of an instance, ``0 0.1 0.2 0.5 0.2 0.5 0.7``, x and y as
shares of the picture's width and height.

Masks are drawn once, with pycocotools, and kept as PNG, from the largest instance to the smallest, so that a cup on a
table stays a cup. What no instance covers is background, which an empty file says of all of a picture; one without a
file has no mask.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from pseudoseg_fast.data.cache import keep_folder, stamps
from pseudoseg_fast.data.decode import image_size
from pseudoseg_fast.data.labels import MAX_CLASSES
from pseudoseg_fast.data.layouts.coco_json import Drawing, draw_instances, need_pycocotools
from pseudoseg_fast.data.layouts.drawn import save_masks
from pseudoseg_fast.data.layouts.tree import Pairs, Tree, first_folder, pair, pictures, stems
from pseudoseg_fast.data.lists import DataError

EXPECTED = (
    "data.yaml with names, and images/train, labels/train, images/val, labels/val, or train/images, train/labels and "
    "so on"
)
BACKGROUND = "background"
_SPLITS = (("train",), ("val", "valid"))

logger = logging.getLogger(__name__)


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    found = _folders(root, _SPLITS[0])
    if found is None or (root / "masks").is_dir():
        return None
    file = _names_file(root)
    return None if file is None else f"it has {file.name} and {found[1].relative_to(root).as_posix()}"


def read(root: Path) -> Tree:
    """Return the pictures, with the background before the classes that the YAML file names."""
    file = _names_file(root)
    if file is None:
        raise DataError(f"no YAML file in {root} has names")
    train, val = (_folders(root, names) for names in _SPLITS)
    if train is None:
        raise DataError(f"neither {root / 'labels/train'} nor {root / 'train/labels'}, with images beside it")
    names = _names(file)
    known = _pairs(root, *train, len(names))
    held_out = _pairs(root, *val, len(names)) if val else Pairs()
    return Tree(
        known.labeled,
        known.unlabeled,
        held_out.labeled,
        unmasked=held_out.unlabeled,
        classes=[BACKGROUND, *names],
        drawn=True,
    )


def _folders(root: Path, names: Sequence[str]) -> tuple[Path, Path] | None:
    """Return the folders of the pictures and of the labels of a split."""
    for name in names:
        for images, labels in ((f"images/{name}", f"labels/{name}"), (f"{name}/images", f"{name}/labels")):
            if first_folder(root, images) and first_folder(root, labels):
                return root / images, root / labels
    return None


def _names_file(root: Path) -> Path | None:
    for path in sorted((*root.glob("*.yaml"), *root.glob("*.yml"))):
        if (content := _content(path)) and "names" in content:
            return path
    return None


def _content(path: Path) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _names(file: Path) -> list[str]:
    """Return the names of the classes, in the order of their numbers from 0.

    Raises:
        DataError: there are none or too many, a number has no name or a name is there twice.
    """
    given: Any = (_content(file) or {}).get("names")
    if isinstance(given, dict):
        given = [given.get(number) for number in range(len(given))]
    listed = given if isinstance(given, list) else []
    names = [" ".join(str(name).split()) for name in listed if name is not None]
    if not names or len(names) != len(listed) or "" in names:
        raise DataError(f"{file} expects a name for each number from 0 on, as names: [cat, dog], got {given}")
    if len({BACKGROUND, *names}) <= len(names):
        raise DataError(
            f"{file} has a name twice, or calls one {BACKGROUND}, which here is what no outline covers; rename it: "
            + ", ".join(names)
        )
    if len(names) >= MAX_CLASSES:
        raise DataError(
            f"{file} has {len(names)} names; expected {MAX_CLASSES - 1} at most, since masks are 8-bit"
        )
    return names


def _pairs(root: Path, images: Path, labels: Path, classes: int) -> Pairs:
    """Return the pictures of a split, with masks drawn where need be.

    Raises:
        DataError: an outline cannot be drawn; the message names all.
        OSError: the masks can be kept nowhere.
    """
    pictures_of = {f"{stem}.txt": name for stem, name in stems(images, pictures(images)).items()}
    files = sorted(name for name in pictures_of if (labels / name).is_file())

    def draw_file(name: str) -> NDArray[np.uint8]:
        text = (labels / name).read_text(encoding="utf-8")
        return draw(text, image_size(images / pictures_of[name]), classes)

    def fill(folder: Path) -> None:
        need_pycocotools(labels)
        logger.info("drawing the masks of %s, once", labels)
        save_masks(folder, files, draw_file)

    known = stamps([labels / name for name in files]).tolist()
    question = ("yolo", str(images), str(labels), classes, files, known)
    return pair(root, images, keep_folder("masks", question, fill))


def draw(text: str, size: tuple[int, int], classes: int) -> NDArray[np.uint8]:
    """Return the mask [H, W] of a label file's text: 0 for the background, and each class plus 1.

    Args:
        text: lines of a class and an outline.
        size: height and width.
        classes: number of classes.

    Raises:
        DataError: a line is no such, or of a class that there is not.
    """
    height, width = size
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    shapes = [_outline(line, number, classes) for number, line in lines]
    outlines = [[(outline * (width, height)).ravel().tolist()] for _, outline in shapes]
    drawing = Drawing("", size, [label + 1 for label, _ in shapes], outlines, [False] * len(shapes))
    return draw_instances(drawing)


def _outline(line: str, number: int, classes: int) -> tuple[int, NDArray[np.float64]]:
    """Return class and points [N, 2] of a line."""
    head, *rest = line.split()
    try:
        label, values = int(head), np.array([float(word) for word in rest])
    except ValueError as error:
        raise DataError(
            f"line {number} expects a class and x and y of points, got {line.strip()[:60]!r}"
        ) from error
    if len(values) == 4:
        raise DataError(f"line {number} is a box, and no outline: export instance segmentation")
    if len(values) < 6 or len(values) % 2:
        raise DataError(
            f"line {number} has {len(values)} numbers behind the class; expected x and y of three points or more"
        )
    if not 0 <= label < classes:
        raise DataError(f"line {number} is of class {label}; the YAML file names 0 to {classes - 1}")
    if not (np.isfinite(values).all() and values.min() >= -0.01 and values.max() <= 1.01):
        raise DataError(
            f"line {number} has x and y from {values.min():g} to {values.max():g}; expected shares from 0 to 1"
        )
    return label, values.reshape(-1, 2)
