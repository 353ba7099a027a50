"""Read a whole data set and say what is wrong with it: ``python -m pseudoseg_fast.check --data.root DIR``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from pseudoseg_fast import visualize
from pseudoseg_fast.config import DataConfig, Parser, to_dict
from pseudoseg_fast.data.decode import read_image
from pseudoseg_fast.data.labels import IGNORE_INDEX, MAX_CLASSES, Labels
from pseudoseg_fast.data.layouts.tree import Tree
from pseudoseg_fast.data.lists import DataError, File, Index, Sample, read_list, shorten
from pseudoseg_fast.data.pool import read_unlabeled
from pseudoseg_fast.data.read import black_and_white, read_mask
from pseudoseg_fast.data.scan import Scan, mean_and_std, scan
from pseudoseg_fast.data.sets import DEMO, background_class, data_root, find_tree, read_labels
from pseudoseg_fast.data.shards import are_remote

EXAMPLES = 6


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


def read_sets(config: DataConfig, root: Path, tree: Tree, report: Report) -> dict[str, list[Sample]]:
    """Return the labelled, unlabelled and val pictures; a list that is wrong is reported and left out."""
    index = Index(tree.samples, tree.image_end)

    def read(
        path: str | None, default: Sequence[Sample], reader: Callable[[str], Sequence[Sample]]
    ) -> Sequence[Sample]:
        if path is None:
            return default
        try:
            return reader(path)
        except DataError as error:
            report.errors.append(str(error))
            return []

    labeled = read(config.labeled, tree.labeled, lambda path: read_list(path, root, index=index))
    val = read(config.val, tree.val, lambda path: read_list(path, root, index=index))
    streamed = config.unlabeled is not None and are_remote(config.unlabeled)
    if streamed:
        report.warnings.append(f"pictures that are streamed are not read: {config.unlabeled}")
    rest = tree.without([*labeled, *val], root)
    unlabeled = read(
        None if streamed else config.unlabeled, rest, lambda path: read_unlabeled(path, root, index)
    )
    if not labeled and not config.labeled:
        report.errors.append(f"no training pictures with masks below {root}; give --data.labeled LIST")
    if not val and not config.val:
        report.errors.append(f"no pictures with masks to evaluate on below {root}; give --data.val LIST")
    if not unlabeled and not config.unlabeled:
        report.warnings.append("no unlabelled pictures: only --method.name supervised can train on this")
    if tree.orphans:
        report.warnings.append(
            f"{len(tree.orphans)} masks have no picture; name both alike, or remove them:\n"
            + shorten([str(path) for path in tree.orphans])
        )
    return {
        "labelled": [*labeled],
        "unlabelled": [sample._replace(mask=None) for sample in unlabeled],
        "val": [*val],
    }


def scan_sets(
    sets: dict[str, list[Sample]], labels: Labels, channels: int, white: float | None
) -> tuple[dict[str, list[Scan]], NDArray[np.int64]]:
    """Read every file once; return what each set holds, and [channels, 256] values of the training pictures."""
    masked = {sample.image: sample for part in sets.values() for sample in part if sample.mask}

    def key(sample: Sample) -> Sample:
        return sample if sample.mask else masked.get(sample.image, sample)

    trained = {key(sample) for name in ("labelled", "unlabelled") for sample in sets[name]}
    unique = list(dict.fromkeys(key(sample) for part in sets.values() for sample in part))
    levels = np.zeros((channels, 256), np.int64)
    found: dict[Sample, Scan] = {}
    for one in tqdm(
        scan(unique, labels, channels, white), "check", len(unique), unit="picture", disable=None
    ):
        if one.levels is not None and one.sample in trained:
            levels += one.levels
        found[one.sample] = dataclasses.replace(one, levels=None)
    return {name: [found[key(sample)] for sample in part] for name, part in sets.items()}, levels


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


def draw_samples(
    samples: Sequence[Sample],
    classes: Sequence[str],
    labels: Labels,
    config: DataConfig,
    channels: int,
    path: Path,
) -> None:
    """Write a picture of a few samples: the picture, its mask, and both together."""
    colors = visualize.palette(len(classes), background_class(config.background, classes))
    rows = []
    for sample in [
        samples[index] for index in np.unique(np.linspace(0, len(samples) - 1, EXAMPLES).astype(int))
    ]:
        if sample.mask is None:
            continue
        image = read_image(sample.image, channels, config.white)
        image = visualize.as_color(image[..., None] if image.ndim == 2 else image)
        mask = visualize.colorize(read_mask(sample.mask, labels, sample.image), colors)
        rows.append([image, mask, np.round(image * 0.5 + mask * 0.5).astype(np.uint8)])
    visualize.grid(rows, ["picture", "mask", "both"], classes, colors).save(path)


def check(config: DataConfig, channels: int, picture: Path | None) -> tuple[Report, dict[str, object]]:
    """Read all files of a data set and report.

    Args:
        config: the data set.
        channels: of a picture.
        picture: where samples are drawn to, if anywhere.

    Returns:
        The report, and mean and standard deviation of the training pictures for the configuration of a model.

    Raises:
        DataError: the folder, the layout or the names of the classes cannot be read.
    """
    report = Report()
    root = data_root(config)
    layout, tree = find_tree(config, root)
    report.notes.append(f"{root}, layout {layout}")
    classes: list[str] = []
    try:
        classes, labels = read_labels(config, root, tree)
    except DataError as error:
        if config.classes or config.color_map:
            raise
        report.errors.append(str(error))
        labels = Labels(MAX_CLASSES, config.ignore_index)
    sets = read_sets(config, root, tree, report)
    scans, levels = scan_sets(sets, labels, channels, config.white)
    report_pictures(scans, channels, report)
    report_masks(scans, classes, labels, report)
    report_duplicates(scans, report)
    usable = [
        one.sample
        for name in ("labelled", "val")
        for one in scans[name]
        if not (one.problem or one.mask_problem)
    ]
    if picture and classes and usable:
        draw_samples(usable, classes, labels, config, channels, picture)
        report.notes.append(f"samples: {picture}")
    if not levels.any():
        return report, {}
    mean, std = mean_and_std(levels)
    report.notes.append(
        f"training pictures have --model.mean {mean} --model.std {std}"
        + (
            "; pretrained encoders want those that they were trained with, which are the default"
            if channels == 3
            else ""
        )
    )
    return report, {"in_channels": channels, "mean": mean, "std": std}


def save(path: Path, config: DataConfig, model: dict[str, object]) -> None:
    """Write a configuration for ``--config``, whole or not at all.

    Raises:
        ValueError: the file is there already.
    """
    default = to_dict(DataConfig(config.root))
    changed = {
        name: value for name, value in to_dict(config).items() if name == "root" or value != default[name]
    }
    values = {"data": changed, "model": model}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        yaml.safe_dump(values, file, sort_keys=False)
    try:
        os.link(file.name, path)
    except FileExistsError as error:
        raise ValueError(f"{path} is there already; remove it, or choose another --save") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; status 1 where the data set has errors, 2 for wrong options."""
    parser = Parser(prog="python -m pseudoseg_fast.check", description=__doc__, allow_abbrev=False)
    parser.add_argument("--picture", type=str, default="check.png", help="file that samples are drawn to")
    parser.add_argument("--save", type=str, help="file for --config that gets the data options, mean and std")
    parser.add_argument("--model.in_channels", type=int, default=3, help="channels of a picture")
    parser.add_class_arguments(DataConfig, "data")
    options = parser.instantiate(parser.parse_args(sys.argv[1:] if arguments is None else arguments))
    try:
        report, model = check(options.data, options.model.in_channels, Path(options.picture))
        if options.save and model:
            root = options.data.root if options.data.root == DEMO else os.path.abspath(options.data.root)
            save(Path(options.save), dataclasses.replace(options.data, root=root), model)
            report.notes.append(f"configuration: --config {options.save}")
    except DataError as error:
        print(f"error: {error}")
        return 1
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(report)
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
