"""What is wrong with a data set that has been scanned, and what to do about it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pseudoseg_fast.data.labels import IGNORE_INDEX, Labels
from pseudoseg_fast.data.lists import File, shorten
from pseudoseg_fast.data.read import black_and_white
from pseudoseg_fast.data.scan import Scan


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


def report_pictures(scans: dict[str, list[Scan]], channels: int, report: Report) -> None:
    """Report sizes, modes, and pictures that cannot be read."""
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
            f"{len(broken)} pictures cannot be used; repair them or take them off the lists:\n{shorten(broken)}"
        )
    if turned := sum(found.turned for found in every):
        report.notes.append(
            f"{turned} pictures are turned upright as their EXIF orientation says; masks without one are taken to be "
            "upright already (--data.mask_orientation stored turns them with their pictures)"
        )
    peaks = [found.peak for found in every if found.peak is not None]
    if peaks:
        report.warnings.append(
            f"{len(peaks)} pictures have more than 8 bits, values up to {max(peaks):g}; without --data.white the high "
            f"byte of 16 bits is used: give --data.white {max(peaks):g}, or what the camera's white is"
        )
    grey = sum(found.mode in ("L", "1", "I;16", "I") for found in every)
    if channels == 3 and grey and grey == len(every):
        report.warnings.append("all pictures are grey: --model.in_channels 1 saves two channels")


def report_masks(
    scans: dict[str, list[Scan]], classes: Sequence[str], labels: Labels, report: Report
) -> None:
    """Report masks that cannot be used, what to do about them, and the classes that they show."""
    masked = [found for name in ("labelled", "val") for found in scans[name]]
    strange = Counter(number for found in masked for number in found.wrong_ids)
    if strange:
        files = [
            f"{found.sample.mask}: {', '.join(map(str, found.wrong_ids[:8]))}"
            for found in masked
            if found.wrong_ids
        ]
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
    if black_and_white(labels, together):
        report.errors.append(
            "the masks hold 0 and 255 alone, and 255 means ignored; for masks drawn in black and white give "
            "--data.label_map 255:1"
        )
    if not classes:
        ids = ", ".join(map(str, np.flatnonzero(together)[:40].tolist()))
        report.errors.append(
            f"the masks hold the ids {ids}; write their names to classes.txt, one a line from id 0 on"
        )
        return
    report.notes.append(class_table(classes, scans))
    for name, effect in (("labelled", "nothing can teach them"), ("val", "they are not scored")):
        absent = [label for label, count in zip(classes, pixels[name], strict=False) if not count]
        if scans[name] and absent and not strange and not others:
            report.warnings.append(f"no {name} picture shows {', '.join(absent)}: {effect}")


def advice(strange: Counter[int], labels: Labels) -> str:
    """Return what is to be done about ids that mean nothing, by the number of masks that hold them."""
    ids = sorted(strange)
    ways = [
        f"if they mean nothing, --data.label_map {','.join(f'{number}:{IGNORE_INDEX}' for number in ids[:8])}"
    ]
    if len(ids) == 1:
        ways = [f"if it means no label, --data.ignore_index {ids[0]}"]
    if ids == [labels.classes] and not labels.reduce_zero_label:
        ways.append("if 0 means no label and classes count from 1, --data.reduce_zero_label true")
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
    """Report files of the same content under two names, and val pictures that are trained on."""
    places: dict[bytes, dict[File, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, part in scans.items():
        for found in part:
            if found.digest:
                places[found.digest][found.sample.image].add(name)
    leaks, copies = [], []
    for files in places.values():
        sets = set().union(*files.values())
        text = " = ".join(sorted(f"{path} ({', '.join(sorted(of))})" for path, of in files.items()))
        if "val" in sets and len(sets) > 1:
            leaks.append(text)
        elif len(files) > 1:
            copies.append(text)
    if leaks:
        report.errors.append(
            f"{len(leaks)} val pictures are trained on, which makes their scores worthless; take them off one list:\n"
            + shorten(leaks)
        )
    if copies:
        report.warnings.append(f"{len(copies)} pictures are there more than once:\n{shorten(copies)}")
