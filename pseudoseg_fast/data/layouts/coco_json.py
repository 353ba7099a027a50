"""Masks of class ids from COCO's annotation files, drawn once and kept as PNG.

Instances (``instances_train2017.json``): polygons and run lengths, drawn with pycocotools. Crowds are drawn first, then
instances from the largest to the smallest, so that a cup on a table stays a cup. A crowd is of its class: where one
person ends and the next begins is no question of semantic segmentation, and torchvision and the conversions of
panoptic masks hold it so, too.

Panoptic (``panoptic_train2017.json`` and its PNGs): segments of things get their class, those of stuff are background,
and pixels of no segment are ignored.

Classes are the background and the file's things in the order of their ids: for COCO the 81 of the other mask files.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections import defaultdict
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
from pseudoseg_fast.data.labels import IGNORE_INDEX
from pseudoseg_fast.data.lists import DataError, read_lines

logger = logging.getLogger(__name__)

BACKGROUND = "background"
CLASSES = "classes.txt"
VERSION = 1
"""To be raised with every change of what is drawn."""
_ALONE = 64
_CHUNK = 64


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


def instance_masks(file: Path, images: Path) -> Path:
    """Return the folder of masks of an instance file, with the names of the classes in ``classes.txt``.

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
        for image in content["images"]:
            shapes = by_image[image["id"]]
            if bare := [shape["id"] for shape in shapes if not shape.get("segmentation")]:
                raise DataError(f"{file}: annotation {bare[0]} has a box and no segmentation; expected masks")
            yield Drawing(
                _mask_name(image["file_name"], images),
                (image["height"], image["width"]),
                [classes[shape["category_id"]] for shape in shapes],
                [shape["segmentation"] for shape in shapes],
                [bool(shape.get("iscrowd", 0)) for shape in shapes],
            )

    try:
        import pycocotools.mask  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"{file} holds polygons, which pycocotools draws; run: pip install 'pseudoseg-fast[coco]'"
        ) from error
    return _keep(file, images, drawings)


def panoptic_masks(file: Path, segments: Path, images: Path) -> Path:
    """Return the folder of masks of a panoptic file and the folder of its PNGs, likewise."""

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


def mask_classes(masks: Path) -> list[str]:
    """Return the names of the classes of a folder of masks."""
    return [name for _, name in read_lines(masks / CLASSES)]


def _keep(
    file: Path, images: Path, drawings: Callable[[dict[str, Any], dict[int, int]], Iterator[Drawing]]
) -> Path:
    """Draw all masks of a file, unless they are there."""

    def fill(folder: Path) -> None:
        logger.info("drawing the masks of %s, once", file)
        try:
            content = json.loads(file.read_bytes())
            names, classes = _classes(content["categories"])
            tasks = list(drawings(content, classes))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{file} is no COCO annotation file: {type(error).__name__}: {error}") from error
        if not tasks:
            raise DataError(f"{file} names no pictures")
        del content
        (folder / CLASSES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
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

    return keep_folder("masks", (VERSION, str(file), stamp(file), str(images)), fill)


def _classes(categories: list[dict[str, Any]]) -> tuple[list[str], dict[int, int]]:
    """Return the names of the classes, and the class of each category that has one of its own."""
    things = sorted(
        (category for category in categories if category.get("isthing", 1)),
        key=lambda category: category["id"],
    )
    names = [BACKGROUND]
    classes = {}
    for thing in things:
        if thing["name"].lower() == BACKGROUND:
            classes[thing["id"]] = 0
            continue
        classes[thing["id"]] = len(names)
        names.append(thing["name"])
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
            mask = _draw_instances(task) if task.source is None else _draw_panoptic(task, task.source)
        except Exception as error:  # pycocotools raises nothing narrower
            raise DataError(f"the mask {task.name} cannot be drawn: {error}") from error
        Image.fromarray(mask).save(folder / task.name)
    return len(tasks)


def _draw_instances(task: Drawing) -> NDArray[np.uint8]:
    """Return the mask [H, W] of a picture's instances."""
    from pycocotools import mask as coco

    height, width = task.size
    drawn = []
    for label, shape, crowd in zip(task.classes, task.shapes, task.crowds, strict=True):
        if isinstance(shape, list):
            shape = coco.merge(coco.frPyObjects(shape, height, width))
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
