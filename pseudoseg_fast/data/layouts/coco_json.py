"""Masks of class ids from COCO's annotation files, drawn once and kept as PNG.

Instances (``instances_train2017.json``): polygons and run lengths, drawn with pycocotools. Crowds are drawn first, then
instances from the largest to the smallest, so that a cup on a table stays a cup. A crowd is of its class: where one
person ends and the next begins is no question of semantic segmentation, and torchvision and the conversions of
panoptic masks hold it so, too.

Panoptic (``panoptic_train2017.json`` and its PNGs): segments of things get their class, those of stuff are background,
and pixels of no segment are ignored.

Classes are the background and the file's things in the order of their ids, of which those of one name are one class:
for COCO the 81 of the other mask files.

What no instance covers is background. That goes for pictures without any annotation where the classes are COCO's own,
whose annotators looked at all of them. Annotation tools list all pictures of a project, also those that nobody has
looked at yet: with other classes such pictures get no mask.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pseudoseg_fast.data.cache import keep_folder, stamp
from pseudoseg_fast.data.decode import open_whole
from pseudoseg_fast.data.labels import IGNORE_INDEX, MAX_CLASSES
from pseudoseg_fast.data.layouts.tree import class_names
from pseudoseg_fast.data.lists import DataError, shorten

logger = logging.getLogger(__name__)

BACKGROUND = "background"
ABOUT = ".about.json"
"""What is known of a folder of masks; hidden from those who look for masks in it."""
_ALONE = 64
_CHUNK = 64


@dataclass(frozen=True)
class Masks:
    """A folder of masks.

    Args:
        folder: where they are.
        classes: names in the order of their ids.
        listed: number of pictures that the annotation file names.
        annotated: number of those with any annotation.
        drawn: number of masks.
    """

    folder: Path
    classes: list[str]
    listed: int
    annotated: int
    drawn: int


@dataclass(frozen=True)
class Drawing:
    """What one mask is drawn from.

    Args:
        name: path of the mask below the folder of masks.
        size: height and width.
        classes: of the annotations.
        shapes: the annotations; of a panoptic mask the ids of its segments.
        crowds: whether an annotation is of a crowd.
        source: a panoptic mask's file.
    """

    name: str
    size: tuple[int, int]
    classes: list[int]
    shapes: list[Any]
    crowds: list[bool]
    source: Path | None = None


def instance_masks(file: Path, images: Path) -> Masks:
    """Return the masks of an instance file.

    Args:
        file: the annotations.
        images: folder of the pictures, which masks are named like.

    Raises:
        DataError: the file is damaged or has no masks, or pycocotools is not installed.
        OSError: the masks can be kept nowhere.
    """

    def drawings(content: dict[str, Any], classes: dict[int, int]) -> Iterator[Drawing]:
        by_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for shape in content["annotations"]:
            by_image[shape["image_id"]].append(shape)
        problems = [
            f"annotation {shape.get('id', 'without id')} {problem}, in {image['file_name']}"
            for image in content["images"]
            for shape in by_image[image["id"]]
            if (problem := _problem(shape, image, classes))
        ]
        if problems:
            raise DataError(
                f"{file}: {len(problems)} annotations cannot be drawn; mend or remove them:\n{shorten(problems)}"
            )
        for image in content["images"]:
            shapes = by_image[image["id"]]
            yield Drawing(
                _mask_name(image["file_name"], images),
                (image["height"], image["width"]),
                [classes[shape["category_id"]] for shape in shapes],
                [shape["segmentation"] for shape in shapes],
                [bool(shape.get("iscrowd", 0)) for shape in shapes],
            )

    need_pycocotools(file)
    return _keep(file, images, drawings)


def need_pycocotools(file: Path) -> None:
    """Refuse outlines that nothing can draw.

    Raises:
        DataError: pycocotools is not installed.
    """
    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{file} holds polygons, which pycocotools draws; run: pip install 'pseudoseg-fast[coco]'"
        ) from error


def _problem(shape: dict[str, Any], image: dict[str, Any], classes: dict[int, int]) -> str | None:
    """Return why an instance cannot be drawn, or None."""
    if shape["category_id"] not in classes:
        known = ", ".join(map(str, itertools.islice(classes, 9))) + (", ..." if len(classes) > 9 else "")
        return f"is of category {shape['category_id']}, which is none of the file's things: {known}"
    parts = shape.get("segmentation")
    if not parts:
        return "has a box and no segmentation"
    if isinstance(parts, list):
        covers = any(map(_is_polygon, parts))
        return (
            None
            if covers
            else f"has the polygon {str(parts[0])[:40]}; expected x, y of three points at least"
        )
    size = [image["height"], image["width"]]
    return None if parts["size"] == size else f"is drawn on {parts['size']} pixels, its picture has {size}"


def _is_polygon(part: object) -> bool:
    """Say whether a part of a segmentation is a list of x, y, x, y ... of three points: fewer cover nothing."""
    return isinstance(part, list) and len(part) >= 6 and isinstance(part[0], (int, float))


def panoptic_masks(file: Path, segments: Path, images: Path) -> Masks:
    """Return the masks of a panoptic file and the folder of its PNGs, likewise."""

    def drawings(content: dict[str, Any], classes: dict[int, int]) -> Iterator[Drawing]:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for image in content["annotations"]:
            infos = image["segments_info"]
            yield Drawing(
                _mask_name(names[image["image_id"]], images),
                (0, 0),
                [classes.get(info["category_id"], 0) for info in infos],
                [info["id"] for info in infos],
                [],
                segments / image["file_name"],
            )

    return _keep(file, images, drawings)


def _keep(
    file: Path, images: Path, drawings: Callable[[dict[str, Any], dict[int, int]], Iterator[Drawing]]
) -> Masks:
    """Draw all masks of a file, unless they are there."""

    def fill(folder: Path) -> None:
        logger.info("drawing the masks of %s, once", file)
        try:
            content = json.loads(file.read_bytes())
            names, classes = _classes(_without_root(content), file)
            tasks = list(drawings(content, classes))
            listed = len(content["images"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file} is no COCO annotation file: {type(error).__name__}: {error}") from error
        if not listed:
            raise DataError(f"{file} names no pictures")
        del content
        annotated = [task for task in tasks if task.shapes or task.source]
        if names != class_names("coco"):
            tasks = annotated
        about = {"classes": names, "listed": listed, "annotated": len(annotated), "drawn": len(tasks)}
        (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        for above in {os.path.dirname(task.name) for task in tasks}:
            (folder / above).mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=len(tasks), desc="masks", unit="picture", disable=None)
        if len(tasks) < _ALONE:
            for task in tasks:
                bar.update(_save(folder, [task]))
            return
        chunks = (tasks[start : start + _CHUNK] for start in range(0, len(tasks), _CHUNK))
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for count in pool.map(_save, itertools.repeat(folder), chunks):
                bar.update(count)

    folder = keep_folder("masks", (str(file), stamp(file), str(images)), fill)
    return Masks(folder, **json.loads((folder / ABOUT).read_text(encoding="utf-8")))


def _without_root(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the categories but for the one that Roboflow puts above all others, which no annotation has.

    It is called after the project, is the supercategory of others, and "none" is its own.
    """
    used = {shape.get("category_id") for shape in content["annotations"]}
    above = {category.get("supercategory") for category in content["categories"]}
    return [
        category
        for category in content["categories"]
        if category["id"] in used or category["name"] not in above or category.get("supercategory") != "none"
    ]


def _classes(categories: list[dict[str, Any]], file: Path) -> tuple[list[str], dict[int, int]]:
    """Return the names of the classes, and the class of each category that has one.

    Raises:
        DataError: there are none or too many, a name is empty, or an id has two.
    """
    things = sorted(
        (category for category in categories if category.get("isthing", 1)),
        key=lambda category: category["id"],
    )
    names = [BACKGROUND]
    classes: dict[int, int] = {}
    for thing in things:
        name = " ".join(thing["name"].split())
        name = BACKGROUND if name.lower() == BACKGROUND else name
        if name not in names:
            names.append(name)
        if not name or classes.setdefault(thing["id"], names.index(name)) != names.index(name):
            raise DataError(
                f"{file}: the category {thing['id']} has {'two names' if name else 'no name'}; give it one"
            )
    if not 2 <= len(names) <= MAX_CLASSES:
        raise DataError(
            f"{file} names {len(names) - 1} categories of things beside the background; expected 1 to "
            f"{MAX_CLASSES - 1}, since masks are 8-bit and 255 means ignored"
        )
    for target, count in Counter(classes.values()).items():
        if count > 1:
            logger.info("%s: %d categories are called %s, and are one class", file, count, names[target])
    return names, classes


def _mask_name(picture: str, images: Path) -> str:
    """Return the path of a picture's mask; annotation files name pictures with folders before them or without."""
    path = PurePosixPath(picture.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not (images / path).is_file():
        path = PurePosixPath(path.name)
    return str(path.with_suffix(".png"))


def _save(folder: Path, tasks: list[Drawing]) -> int:
    """Draw and save masks; return how many."""
    for task in tasks:
        try:
            mask = draw_instances(task) if task.source is None else _draw_panoptic(task, task.source)
        except Exception as error:  # pycocotools raises nothing narrower
            raise DataError(f"the mask {task.name} cannot be drawn: {error}") from error
        Image.fromarray(mask).save(folder / task.name)
    return len(tasks)


def draw_instances(task: Drawing) -> NDArray[np.uint8]:
    """Return the mask [H, W] of a picture's instances."""
    from pycocotools import mask as coco

    height, width = task.size
    drawn = []
    for label, shape, crowd in zip(task.classes, task.shapes, task.crowds, strict=True):
        if isinstance(shape, list):
            shape = coco.merge(coco.frPyObjects(list(filter(_is_polygon, shape)), height, width))
        elif isinstance(shape["counts"], list):
            shape = coco.frPyObjects(shape, height, width)
        drawn.append((not crowd, -int(coco.area(shape)), label, shape))
    mask = np.zeros((height, width), np.uint8)
    for _, _, label, shape in sorted(drawn, key=lambda one: one[:2]):
        mask[coco.decode(shape) > 0] = label
    return mask


def _draw_panoptic(task: Drawing, source: Path) -> NDArray[np.uint8]:
    """Return the mask [H, W] of a panoptic PNG, whose colours are the ids of segments."""
    with open_whole(source) as file:
        pixels = np.asarray(file.convert("RGB")).astype(np.int64)
    ids, places = np.unique(pixels @ np.array([1, 256, 65536]), return_inverse=True)
    classes = dict(zip(task.shapes, task.classes, strict=True))
    table = np.array([classes.get(number, IGNORE_INDEX) for number in ids.tolist()], np.uint8)
    return table[places].reshape(pixels.shape[:2])
