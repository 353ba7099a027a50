"""The layout ``labelme``: pictures with LabelMe's JSON files beside them, below ``train`` and ``val`` or anywhere.

Masks are drawn once and kept as PNG, shape after shape in the order of the file, as LabelMe draws them itself. The
classes are the background and the labels in alphabetical order, or those of ``classes.txt`` or of LabelMe's
``labels.txt`` in the order of that file; what is labelled ``__ignore__`` is ignored. What no shape covers is
background, or ignored where the file names none.

A file without any shape is of a picture that nobody has looked at yet, and gives no mask, nor does a picture without a
file.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pseudoseg_fast.data.cache import keep_folder, stamps
from pseudoseg_fast.data.decode import UNREADABLE, image_size
from pseudoseg_fast.data.labels import IGNORE_INDEX, MAX_CLASSES, background_class
from pseudoseg_fast.data.layouts.drawn import DAMAGED, explain, save_masks
from pseudoseg_fast.data.layouts.tree import Pairs, Tree, first_folder, pair
from pseudoseg_fast.data.lists import DataError, is_image, read_classes, shorten
from pseudoseg_fast.data.walk import walk

logger = logging.getLogger(__name__)

EXPECTED = (
    "pictures with LabelMe's .json files beside them, in train and val or in one folder (images, or the root)"
)
NAMES = ("classes.txt", "labels.txt")
BACKGROUND = "background"
IGNORED = "__ignore__"
ABOUT = ".about.json"
POINTS = {"polygon": 3, "rectangle": 2, "oriented_rectangle": 4, "circle": 2, "mask": 2}
"""Shapes that cover something, and how many points each has at least."""
_LOOKED_AT = 10_000
_TRIED = 3

Annotation = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """What was made of the files.

    Args:
        folder: of the masks.
        classes: names in the order of their ids.
        bare: files without any shape.
    """

    folder: Path
    classes: list[str]
    bare: list[str]


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None: with masks beside it is the layout ``folder``."""
    if (root / "masks").is_dir():
        return None
    for folder in _folders(root):
        files = [os.path.relpath(path, root) for path in islice(walk(folder), _LOOKED_AT)]
        for name in islice(_beside(files), _TRIED):
            if _is_annotation(root / name):
                return f"it has LabelMe's {Path(name).as_posix()}"
    return None


def read(root: Path) -> Tree:
    """Return the pictures; those below a folder ``val`` are to evaluate on."""
    train, *rest = _folders(root)
    drawn = masks(root)
    if drawn.bare:
        logger.info(
            "%d of LabelMe's files have no shape: their pictures are taken for such that nobody has looked at yet, and "
            "get no mask; where one shows background alone, draw any part of it as %s",
            len(drawn.bare),
            BACKGROUND,
        )
    known, held_out = pair(root, train, drawn.folder / train.relative_to(root)), Pairs()
    if rest:
        held_out = pair(root, rest[0], drawn.folder / rest[0].relative_to(root))
    return Tree(
        known.labeled,
        known.unlabeled,
        held_out.labeled,
        unmasked=held_out.unlabeled,
        classes=drawn.classes,
        drawn=True,
    )


def _folders(root: Path) -> list[Path]:
    """Return the folder of the training pictures and, where there is one, that of the val pictures."""
    train = first_folder(root, "images/train", "train")
    if train is None:
        return [first_folder(root, "images") or root]
    above = train.parent
    val = first_folder(above, "val", "valid")
    return [train] if val is None else [train, val]


def _beside(files: Sequence[str]) -> dict[str, str]:
    """Return the JSON files among these that have a picture of their name, sorted, each with its picture."""
    pictures = {os.path.splitext(name)[0]: name for name in files if is_image(name)}
    found = sorted(name for name in files if name.endswith(".json"))
    return {name: pictures[name[:-5]] for name in found if name[:-5] in pictures}


def _is_annotation(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "shapes" in content and "imagePath" in content


def masks(root: Path) -> Drawn:
    """Return the masks of all annotation files below a data set's folders, drawn where need be.

    Raises:
        DataError: a file or one of its shapes cannot be drawn; the message names all.
        OSError: the masks can be kept nowhere.
    """
    found = [os.path.relpath(path, root) for folder in _folders(root) for path in walk(folder)]
    files = _beside(found)
    given = next((root / name for name in NAMES if (root / name).is_file()), None)
    listed = None if given is None else read_classes(given)

    def fill(folder: Path) -> None:
        logger.info("drawing the masks of %d files of LabelMe, once", len(files))
        annotations = _read_all(root, files)
        classes = _class_names(annotations, listed, given)
        bare = [name for name, annotation in annotations.items() if not annotation["shapes"]]

        def draw_file(name: str) -> NDArray[np.uint8]:
            return draw(annotations[name], image_size(root / files[name]), classes)

        save_masks(folder, [name for name in annotations if name not in bare], draw_file)
        (folder / ABOUT).write_text(json.dumps({"classes": classes, "bare": bare}), encoding="utf-8")

    question = ("labelme", str(root), listed, list(files), stamps([root / name for name in files]).tolist())
    folder = keep_folder("masks", question, fill)
    return Drawn(folder, **json.loads((folder / ABOUT).read_text(encoding="utf-8")))


def _read_all(root: Path, files: Iterable[str]) -> dict[str, Annotation]:
    """Return the annotations by file, without the pictures that some hold; other JSON files are left out."""
    annotations = {}
    problems = []
    for name in files:
        try:
            content = json.loads((root / name).read_bytes())
            if not (isinstance(content, dict) and "shapes" in content and "imagePath" in content):
                continue
            shapes = [{**shape, "label": " ".join(shape["label"].split())} for shape in content["shapes"]]
        except DAMAGED as error:
            problems.append(f"{name}: {explain(error)}")
            continue
        annotations[name] = {**content, "shapes": shapes, "imageData": None}
    if problems:
        raise DataError(
            f"{len(problems)} files are none of LabelMe's; mend or remove them:\n{shorten(problems)}"
        )
    return annotations


def _class_names(
    annotations: Mapping[str, Annotation], listed: list[str] | None, given: Path | None
) -> list[str]:
    """Return the names of the classes, without that of what is ignored.

    Raises:
        DataError: there are none or too many, or a label is not among those that are listed.
    """
    users: dict[str, str] = {}
    for name, annotation in annotations.items():
        for shape in annotation["shapes"]:
            users.setdefault(shape["label"], name)
    users.pop(IGNORED, None)
    if listed is not None:
        names = [name for name in listed if name != IGNORED]
        known = set(names)
        if background_class("auto", names) is not None:
            known |= {name for name in users if background_class("auto", [name]) == 0}
        if missing := [
            f"{label!r}, first in {users[label]}" for label in sorted(users) if label not in known
        ]:
            raise DataError(
                f"{len(missing)} labels are not among the classes of {given}; name them there, or rename them:\n"
                f"{shorten(missing)}"
            )
    else:
        names = [BACKGROUND, *sorted(name for name in users if background_class("auto", [name]) is None)]
    if not 2 <= len(names) <= MAX_CLASSES:
        raise DataError(
            f"LabelMe's {len(annotations)} files name {len(names) - 1} labels beside the background; expected 1 to "
            f"{MAX_CLASSES - 1}, since masks are 8-bit and 255 means ignored"
        )
    return names


def draw(annotation: Annotation, size: tuple[int, int], classes: Sequence[str]) -> NDArray[np.uint8]:
    """Return the mask [H, W] of an annotation.

    Args:
        annotation: LabelMe's, with a label in ``classes`` for each shape.
        size: height and width of the upright picture; the annotation may be of one that lies, see
            ``data.mask_orientation``.
        classes: names in the order of their ids.

    Raises:
        DataError: a shape covers nothing or is damaged, or the picture is of another size.
    """
    background = background_class("auto", classes)
    ids = {name: index for index, name in enumerate(classes)} | {IGNORED: IGNORE_INDEX}
    rest = IGNORE_INDEX if background is None else background
    height, width = (
        annotation.get(name) or side for name, side in zip(("imageHeight", "imageWidth"), size, strict=True)
    )
    if sorted((height, width)) != sorted(size):
        raise DataError(
            f"it is drawn on {width} x {height} pixels, and its picture has {size[1]} x {size[0]}"
        )
    mask = Image.new("L", (width, height), rest)
    for number, shape in enumerate(annotation["shapes"], 1):
        label = ids.get(shape["label"], rest)
        kind = shape.get("shape_type") or "polygon"
        points = [tuple(map(float, point[:2])) for point in shape.get("points", ())]
        if kind not in POINTS:
            raise DataError(f"shape {number}, {shape['label']!r}, is a {kind}, which covers no pixels")
        if len(points) < POINTS[kind]:
            raise DataError(
                f"shape {number}, {shape['label']!r}, has {len(points)} points; a {kind} has {POINTS[kind]}"
            )
        if kind == "mask":
            _paste(mask, shape, points[0], label, number)
        else:
            _fill(ImageDraw.Draw(mask), kind, points, label)
    return np.array(mask)


def _fill(canvas: ImageDraw.ImageDraw, kind: str, points: Sequence[tuple[float, ...]], label: int) -> None:
    (x, y), (other_x, other_y) = points[:2]
    if kind == "rectangle":
        canvas.rectangle((min(x, other_x), min(y, other_y), max(x, other_x), max(y, other_y)), fill=label)
    elif kind == "circle":
        radius = math.hypot(other_x - x, other_y - y)
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=label)
    else:
        canvas.polygon([(one[0], one[1]) for one in points], fill=label, outline=label)


def _paste(mask: Image.Image, shape: Annotation, corner: tuple[float, ...], label: int, number: int) -> None:
    """Draw a shape that is a bitmap of its own, a PNG in base64 from its upper left corner on."""
    try:
        bitmap = Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))).convert("L")
    except (KeyError, binascii.Error, *UNREADABLE) as error:
        raise DataError(
            f"shape {number}, {shape['label']!r}, has a bitmap that cannot be read: {error}"
        ) from error
    covered = bitmap.point(lambda value: 255 if value else 0)
    mask.paste(label, (round(corner[0]), round(corner[1])), covered)
