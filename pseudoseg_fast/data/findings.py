"""What is wrong with a data set that has been scanned, and what to do about it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pseudoseg_fast.data.decode import image_size
from pseudoseg_fast.data.labels import IGNORE_INDEX, Labels
from pseudoseg_fast.data.lists import DataError, File, Sample, shorten
from pseudoseg_fast.data.read import black_and_white
from pseudoseg_fast.data.samples import spread
from pseudoseg_fast.data.scan import Scan

_DEEP = "have more than 8 bits, of which the high byte of 16 is used without --data.white"
_COPIES = 3  # names that a line shows of one content
_FLOATS = "hold floating-point numbers, which are read with --data.white alone"

_MEASURED = 20
MANY_CROPS = 3
"""Crops along a picture's shorter side above which a crop shows too little of what is around it."""


@dataclass
class Report:
    """What was found: errors stop training or spoil it, warnings may be meant."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return all of it, the worst last."""
        kinds = (("", self.notes), ("warning: ", self.warnings), ("error: ", self.errors))
        return "\n".join(f"{kind}{text}" for kind, texts in kinds for text in texts)


def report_pictures(scans: dict[str, list[Scan]], channels: int, white: float | None, report: Report) -> None:
    """Report sizes, modes, and pictures that cannot be read, or only in part without ``white``."""
    for name, part in scans.items():
        sizes = [found.size for found in part if found.size]
        if sizes:
            heights, widths = zip(*sizes, strict=True)
            range_of = f"{min(widths)} x {min(heights)} to {max(widths)} x {max(heights)}"
            modes = Counter(found.mode for found in part if found.mode)
            report.notes.append(
                f"{name}: {len(part)} pictures, {range_of} pixels, "
                + ", ".join(f"{count} {mode}" for mode, count in modes.most_common(8))
            )
    every = [found for part in scans.values() for found in part]
    if broken := list(dict.fromkeys(found.problem for found in every if found.problem)):
        report.errors.append(
            f"{len(broken)} pictures cannot be used; repair them, or remove them and take them off lists:\n"
            + shorten(broken)
        )
    if turned := sum(found.turned for found in every):
        report.notes.append(
            f"{turned} pictures are turned upright as their EXIF orientation says; masks without one are taken to be "
            "upright already (--data.mask_orientation stored turns them with their pictures)"
        )
    peaks: dict[str, list[float]] = defaultdict(list)
    for found in every:
        if found.peak is not None and white is None:
            is_float = found.mode == "F" or "float" in found.mode
            peaks[_FLOATS if is_float else _DEEP].append(found.peak)
    for kind, values in peaks.items():
        peak = max((value for value in values if 0 < value < math.inf), default=None)
        report.warnings.append(
            f"{len(values)} pictures {kind}: give --data.white "
            + ("VALUE, what" if peak is None else f"{peak:g}, their largest value, or what")
            + " the camera's white is, here and in training"
        )
    grey = sum(found.mode in ("L", "1", "I;16", "I") for found in every)
    if channels == 3 and grey and grey == len(every):
        report.warnings.append("all pictures are grey: --model.in_channels 1 saves two channels")


def report_crops(scans: dict[str, list[Scan]], crop_size: int, report: Report) -> None:
    """Warn where pictures, which no ``data.short_side`` makes smaller, have more than ``MANY_CROPS`` crops to a side.

    Args:
        scans: of each set.
        crop_size: side of the training crops in pixels.
        report: gets the warning.
    """
    sizes = [found.size for found in scans["labelled"] if found.size]
    if said := small_crops(sizes, crop_size):
        report.warnings.append(said)


def crops_in(samples: Sequence[Sample], crop_size: int) -> str:
    """Return what :func:`small_crops` says of some of these pictures."""
    sizes = []
    for index in spread(len(samples), _MEASURED):
        with suppress(DataError):  # one that cannot be read is reported elsewhere
            sizes.append(image_size(samples[index].image))
    return small_crops(sizes, crop_size)


def small_crops(sizes: Sequence[tuple[int, int]], crop_size: int) -> str:
    """Return what is wrong with crops of so many pixels in pictures of these heights and widths, or an empty string."""
    if not sizes:
        return ""
    height, width = (int(side) for side in np.median(sizes, axis=0))
    if min(height, width) <= MANY_CROPS * crop_size:
        return ""
    share = 100 * crop_size**2 / (height * width)
    return (
        f"a training crop of {crop_size} x {crop_size} pixels is {share:.2g} % of a picture of {width} x {height}: "
        f"give --data.short_side {2 * crop_size}, or what objects need, to check and train alike, or a larger "
        "--data.crop_size"
    )


def report_masks(
    scans: dict[str, list[Scan]], classes: Sequence[str], labels: Labels, report: Report
) -> None:
    """Report masks that cannot be used, what to do about them, and the classes that they show."""
    masked = [found for name in ("labelled", "val") for found in scans[name]]
    strange = Counter(number for found in masked for number in found.wrong_ids)
    if strange:
        files = [f"{found.sample.mask}: {some(found.wrong_ids, 8)}" for found in masked if found.wrong_ids]
        report.errors.append(
            f"ids that mean no class are in {len(files)} of {len(masked)} masks; {advice(strange, labels)}:\n"
            + shorten(files)
        )
    if others := [found.mask_problem for found in masked if found.mask_problem and not found.wrong_ids]:
        report.errors.append(f"{len(others)} masks cannot be used:\n{shorten(others)}")
    if jpeg := [
        str(found.sample.mask)
        for found in masked
        if str(found.sample.mask).lower().endswith((".jpg", ".jpeg"))
    ]:
        report.warnings.append(
            f"{len(jpeg)} masks are JPEG, which invents ids at edges; save them as PNG:\n{shorten(jpeg)}"
        )
    pixels = {name: count_pixels(scans[name]) for name in ("labelled", "val")}
    together = sum(pixels.values(), np.zeros((0, 256), np.int64).sum(0))
    drawn = black_and_white(labels, together)
    if drawn:
        report.errors.append(
            "the masks hold 0 and 255 alone, and 255 means ignored; for masks drawn in black and white give "
            "--data.label_map 255:1"
        )
    if not classes:
        ids = np.flatnonzero(together).tolist()
        report.errors.append(f"the masks hold the ids {some(ids, 40)}; {naming(ids, labels, together)}")
        return
    report.notes.append(class_table(classes, scans))
    if together.any() and not together[0] and len(classes) > 1 and not labels.reduce_zero_label:
        report.warnings.append(
            f"0, the id of {classes[0]}, is in no mask: if ids count from 1, give --data.reduce_zero_label true"
        )
    unscored = "they have no IoU, and count in no mean"
    for name, effect in (("labelled", "the network cannot learn them"), ("val", unscored)):
        absent = [label for label, count in zip(classes, pixels[name], strict=False) if not count]
        if scans[name] and absent and not (strange or others or drawn):
            report.warnings.append(f"no {name} picture shows {', '.join(absent)}: {effect}")


def naming(ids: Sequence[int], labels: Labels, pixels: NDArray[np.int64]) -> str:
    """Return how the classes are to be named that masks hold, by their ids and their pixels, [256]."""
    if ids == [0, IGNORE_INDEX] and black_and_white(replace(labels, classes=2), pixels):
        return (
            "255 means ignored, so for masks drawn in black and white write two names to classes.txt, such as "
            "background and object, the black one's first, and give --data.label_map 255:1"
        )
    return "write their names to classes.txt, one a line from id 0 on"


def some(ids: Sequence[int], shown: int) -> str:
    """Return the first ids, and whether there are more."""
    return ", ".join(map(str, ids[:shown])) + (f" and {len(ids) - shown} more" if len(ids) > shown else "")


def advice(strange: Counter[int], labels: Labels) -> str:
    """Return what is to be done about ids that mean nothing, by the number of masks that hold them."""
    ids = sorted(strange)
    pairs = ",".join(f"{number}:{IGNORE_INDEX}" for number in ids[:8])
    rest = f" and so on for the other {len(ids) - 8}" if len(ids) > 8 else ""
    rest += " --data.reduce_zero_label true" if labels.reduce_zero_label else ""
    ways = [f"if they mean nothing, --data.label_map {pairs}{rest}"]
    if len(ids) == 1:
        ways = [f"if it means no label, --data.ignore_index {ids[0]}"]
    if ids == [labels.classes] and not labels.reduce_zero_label:
        ways.insert(0, "if 0 means no label and classes count from 1, --data.reduce_zero_label true")
    ways.append(
        "if they are classes, name them in --data.classes FILE, or turn them into others with --data.label_map"
    )
    return "; ".join(ways)


def count_pixels(part: Sequence[Scan]) -> NDArray[np.int64]:
    """Return [256] pixels of each class id in all masks."""
    return np.sum(
        [np.zeros(256, np.int64), *(found.pixels for found in part if found.pixels is not None)], axis=0
    )


def class_table(classes: Sequence[str], scans: dict[str, list[Scan]]) -> str:
    """Return a table of each class's share of pixels and number of pictures in the labelled and the val set."""
    names = [*classes, "(ignored)"]
    width = max(len(name) for name in names)
    lines = [f"{'class':<{width}}  labelled: pixels %  pictures  val: pixels %  pictures"]
    for index, name in zip([*range(len(classes)), IGNORE_INDEX], names, strict=True):
        line = f"{name:<{width}}"
        for part, space in (("labelled", 20), ("val", 15)):
            counts = [found.pixels for found in scans[part] if found.pixels is not None]
            share = (
                100
                * sum(int(count[index]) for count in counts)
                / max(1, sum(int(count.sum()) for count in counts))
            )
            line += f"{share:>{space}.2f}{sum(int(count[index] > 0) for count in counts):>10}"
        lines.append(line)
    return "\n".join(lines)


def report_duplicates(scans: dict[str, list[Scan]], report: Report) -> None:
    """Report pictures listed twice, files of the same content under two names, and val pictures that are trained on."""
    for name, part in scans.items():
        counts = Counter(found.sample.image for found in part)
        if repeated := [f"{path}: {count} times" for path, count in counts.items() if count > 1]:
            report.warnings.append(
                f"{len(repeated)} pictures are {name} more than once, and count as often; take the repeats off the "
                f"list:\n{shorten(repeated)}"
            )
    places: dict[bytes, dict[File, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, part in scans.items():
        for found in part:
            if found.digest:
                places[found.digest][found.sample.image].add(name)
    leaks, copies = [], []
    for files in places.values():
        sets = set().union(*files.values())
        names = sorted(f"{path} ({', '.join(sorted(of))})" for path, of in files.items())
        if "val" in sets and len(sets) > 1:
            leaks.append(" = ".join(names))
        elif len(files) > 1:
            more = f" and {len(names) - _COPIES} more" if len(names) > _COPIES else ""
            copies.append(" = ".join(names[:_COPIES]) + more)
    if leaks:
        report.errors.append(
            f"{len(leaks)} val pictures are trained on, which makes their scores worthless; take them off one list:\n"
            + shorten(leaks)
        )
    if copies:
        report.warnings.append(f"{len(copies)} pictures are there more than once:\n{shorten(copies)}")
