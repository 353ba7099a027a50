"""From the numbers or colours of a mask file to class ids: the one conversion, applied where masks are read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from pseudoseg_fast.data.lists import DataError, find_file, nearest, read_lines

IGNORE_INDEX = 255
MAX_CLASSES = 255
Color = tuple[int, int, int]
BACKGROUNDS = ("background", "_background_", "__background__", "bg")
"""Names of the class that is no object, in small letters: plain, LabelMe's, VOC's in some code, and for short."""

_IGNORE = "ignore"


class WrongIds(DataError):
    """A mask whose ids mean nothing; ``ids`` has them."""

    def __init__(self, text: str, ids: Sequence[int]) -> None:
        super().__init__(text)
        self.ids = tuple(ids)


@dataclass(frozen=True)
class Labels:
    """What the pixels of mask files mean.

    ``color_map`` is for masks of colours, and goes with no other conversion. Of an id what comes first decides:
    ``label_map``, ``layout_map``, ``ignore_index``, ``reduce_zero_label``; otherwise it stays as it is.

    Args:
        classes: number of classes C; converted ids are 0 to C - 1, and 255 for ignored.
        ignore_index: id in the files that means ignored.
        label_map: ids in the files to class ids, 255 for ignored.
        layout_map: the same, for masks of some paths alone.
        map_only: shell pattern of the paths whose masks ``layout_map`` is for.
        reduce_zero_label: id 0 in the files means ignored, and the others count from 1.
        color_map: colours (r, g, b) to class ids, 255 for ignored.
        stored: masks lie on their pictures as the files store them, and are turned upright with them.
    """

    classes: int
    ignore_index: int = IGNORE_INDEX
    label_map: Mapping[int, int] = field(default_factory=dict)
    layout_map: Mapping[int, int] = field(default_factory=dict)
    map_only: str = "*"
    reduce_zero_label: bool = False
    color_map: Mapping[Color, int] = field(default_factory=dict)
    stored: bool = False

    def __post_init__(self) -> None:
        """Refuse conversions that contradict each other or lead out of the classes."""
        if not 1 <= self.classes <= MAX_CLASSES:
            raise DataError(
                f"classes must be 1 to {MAX_CLASSES} (masks are 8-bit, 255 is ignored), got {self.classes}"
            )
        of_ids = [name for name in ("label_map", "layout_map", "reduce_zero_label") if getattr(self, name)]
        if self.color_map and of_ids:
            raise ValueError(f"expected colours or ids, got color_map and {of_ids[0]}")
        maps: dict[str, Mapping[Any, int]] = {
            "data.label_map": self.label_map,
            "the layout's conversion (which --data.label_map replaces)": self.layout_map,
            "data.color_map": self.color_map,
        }
        for name, targets in maps.items():
            wrong = sorted({x for x in targets.values() if not 0 <= x < self.classes and x != IGNORE_INDEX})
            if wrong:
                raise DataError(
                    f"{name} leads to {_some(list(map(str, wrong)))}; expected 0 to {self.classes - 1}, or "
                    f"{IGNORE_INDEX} for ignored"
                )

    def convert(self, ids: NDArray[Any], path: Path) -> NDArray[np.uint8]:
        """Turn the ids [H, W] of a mask file into class ids.

        Raises:
            WrongIds: an id means neither a class nor ignored.
        """
        shape = ids.shape
        label_map = self._map_of(path)
        if ids.dtype == np.uint8:
            present = np.flatnonzero(count_ids(ids))
        else:
            present, ids = np.unique(ids, return_inverse=True)
        targets = [self._target(value, label_map) for value in present.tolist()]
        wrong = [value for value, target in zip(present.tolist(), targets, strict=True) if target is None]
        if wrong:
            raise WrongIds(
                f"{path} holds the ids {_some([str(value) for value in wrong])}; {self._expected()}", wrong
            )
        known = np.array([target for target in targets if target is not None], np.uint8)
        if ids.dtype == np.uint8:
            table = np.zeros(256, np.uint8)
            table[present] = known
        else:
            table = known
        return np.take(table, ids.reshape(shape))

    def convert_colors(self, pixels: NDArray[np.uint8], path: Path) -> NDArray[np.uint8]:
        """Turn the colours [H, W, 3] of a mask file into class ids.

        Raises:
            DataError: a colour is not in ``color_map``.
        """
        items = sorted((_code(np.array(color)), target) for color, target in self.color_map.items())
        codes = np.array([code for code, _ in items])
        table = np.array([target for _, target in items], np.uint8)
        found = _code(pixels)
        places = np.searchsorted(codes, found).clip(max=len(codes) - 1)
        strange = np.unique(found[codes[places] != found])
        if len(strange):
            shown = [f"({code >> 16}, {code >> 8 & 255}, {code & 255})" for code in strange[:9].tolist()]
            raise DataError(
                f"{path} holds {len(strange)} colours that no class has: {_some(shown)}; give --data.color_map FILE "
                f"with a line for each ('r g b {_IGNORE}' for pixels without a label)"
                + (", unless the mask was saved as JPEG, which invents colours" if len(strange) > 16 else "")
            )
        return table[places]

    def colors(self, path: Path) -> list[Color | None]:
        """Return the colour of each class: from ``color_map``, or from the palette of a mask file; None without one.

        Where several colours or ids mean a class, the first of them counts.
        """
        found: dict[int | None, Color] = {}
        for color, target in self.color_map.items():
            found.setdefault(target, color)
        if not self.color_map:
            with Image.open(path) as image:
                values = image.getpalette("RGB") or []
            label_map = self._map_of(path)
            for value, color in enumerate(zip(values[::3], values[1::3], values[2::3], strict=True)):
                found.setdefault(self._target(value, label_map), color)
        return [found.get(target) for target in range(self.classes)]

    def _map_of(self, path: Path) -> Mapping[int, int]:
        """Return what turns the ids of a file into class ids."""
        if self.layout_map and fnmatch(str(path), self.map_only):
            return {**self.layout_map, **self.label_map}
        return self.label_map

    def _target(self, value: int, label_map: Mapping[int, int]) -> int | None:
        """Return the class id that an id in a file stands for, or None if it stands for nothing."""
        if value in label_map:
            return label_map[value]
        if value == self.ignore_index:
            return IGNORE_INDEX
        if self.reduce_zero_label:
            return IGNORE_INDEX if value == 0 else self._class(value - 1)
        return self._class(value)

    def _class(self, value: int) -> int | None:
        return value if 0 <= value < self.classes else None

    def _expected(self) -> str:
        first = int(self.reduce_zero_label)
        return (
            f"expected {first} to {self.classes - 1 + first}, or {self.ignore_index} for ignored; --data.classes FILE "
            "names all classes, --data.ignore_index N ignores an id, --data.reduce_zero_label true ignores 0 and "
            "counts from 1, --data.label_map 7:1,9:255 turns 7 into 1 and ignores 9"
        )


def background_class(background: int | str | None, classes: Sequence[str]) -> int | None:
    """Return the id of the background class; "auto" looks for a class of one of the names in ``BACKGROUNDS``.

    Raises:
        DataError: there is no class of that id.
    """
    if isinstance(background, str):
        return next((index for index, name in enumerate(classes) if name.casefold() in BACKGROUNDS), None)
    if background is not None and not 0 <= background < len(classes):
        raise DataError(
            f"data.background expects a class id from 0 to {len(classes) - 1}, auto or null, got {background}"
        )
    return background


def count_ids(mask: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the number of pixels of each id, [256], in a mask [H, W]; Pillow counts faster than numpy."""
    return np.array(Image.fromarray(mask).histogram(), np.int64)


def read_label_map(value: Mapping[int, int] | str | None, root: Path) -> dict[int, int]:
    """Return a map of ids from a mapping, from pairs "from:to" such as "7:1,9:255", or from a YAML file of them.

    Raises:
        DataError: the text is no such thing.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        pairs = [pair.split(":") for pair in value.replace(",", " ").split()]
        if all(len(pair) == 2 and all(re.fullmatch("-?[0-9]+", part) for part in pair) for pair in pairs):
            return {int(old): int(new) for old, new in pairs}
        path = find_file(value, root)
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not a YAML file of 'from: to' lines: {error}") from error
        if not isinstance(value, dict) or not all(
            isinstance(number, int) for pair in value.items() for number in pair
        ):
            raise DataError(f"{path} expects a line 'from: to' for each id, got {str(value)[:80]!r}")
    return dict(value)


def read_color_map(
    path: str | Path, root: Path, classes: Sequence[str] | None = None
) -> tuple[dict[Color, int], list[str]]:
    """Read the colours of classes: lines "r g b class" or "class,r,g,b", separated by commas, tabs or spaces.

    The class is a name, an id, or "ignore"; a first line without numbers is a header. Without ``classes`` the names
    get ids in the order in which they come.

    Returns:
        Class ids by colour, and the names of the classes.

    Raises:
        DataError: the file is missing or empty, a line lacks a colour or a class, or a colour comes twice.
    """
    path = find_file(path, root)
    names = list(classes or [])
    colors: dict[Color, int] = {}
    for order, (number, line) in enumerate(read_lines(path)):
        where = f"{path}, line {number}"
        fields = [part.strip() for part in line.split(",")] if "," in line else line.split()
        if order == 0 and not any(part.isdigit() for part in fields):
            continue
        if len(fields) >= 4 and all(part.isdigit() for part in fields[:3]):
            color, name = fields[:3], " ".join(fields[3:])
        elif len(fields) >= 4 and all(part.isdigit() for part in fields[-3:]):
            color, name = fields[-3:], " ".join(fields[:-3])
        else:
            raise DataError(f"{where}: expected 'r g b class' or 'class,r,g,b', got {line.strip()!r}")
        red, green, blue = map(int, color)
        if max(red, green, blue) > 255:
            raise DataError(f"{where}: colours are 0 to 255, got {line.strip()!r}")
        if (red, green, blue) in colors:
            raise DataError(f"{where}: the colour {red} {green} {blue} has a class already")
        if name not in (*names, _IGNORE) and not name.isdigit():
            if classes is not None:
                raise DataError(f"{where}: {name!r} is not a class{nearest(name, classes)}, or {_IGNORE}")
            names.append(name)
        colors[red, green, blue] = (
            IGNORE_INDEX if name == _IGNORE else names.index(name) if name in names else int(name)
        )
    if not colors:
        raise DataError(f"{path} is empty; expected a line 'r g b class' for each colour")
    return colors, names


def _code(colors: NDArray[Any]) -> NDArray[np.int64]:
    """Return [...] one number for each colour [..., 3]."""
    return colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def _some(words: Sequence[str]) -> str:
    return ", ".join(words[:8]) + (", ..." if len(words) > 8 else "")
