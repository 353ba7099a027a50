"""Read a whole data set and say what is wrong with it: ``python -m pseudoseg_fast.check --data.root DIR``."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from pseudoseg_fast import visualize
from pseudoseg_fast.config import DataConfig, make_parser, parse, to_dict
from pseudoseg_fast.data.decode import describe_file, read_image
from pseudoseg_fast.data.findings import (
    Report,
    report_crops,
    report_duplicates,
    report_masks,
    report_pictures,
)
from pseudoseg_fast.data.labels import MAX_CLASSES, Labels, background_class
from pseudoseg_fast.data.layouts.tree import Tree
from pseudoseg_fast.data.lists import DataError, Index, Sample, read_list
from pseudoseg_fast.data.pool import Pool, pack
from pseudoseg_fast.data.read import read_mask
from pseudoseg_fast.data.samples import spread
from pseudoseg_fast.data.scan import Scan, is_dark, mean_and_std, scan
from pseudoseg_fast.data.sets import (
    DEMO,
    apart_from,
    conversion,
    data_root,
    find_tree,
    nothing_to_evaluate_on,
    read_labels,
    read_others,
)
from pseudoseg_fast.data.shards import ShardSamples, are_shards, expand
from pseudoseg_fast.data.stream import Stream
from pseudoseg_fast.data.tagged import find_tags, warn_of_untagged
from pseudoseg_fast.data.tags import FROM_MASKS
from pseudoseg_fast.stop import end_quietly
from pseudoseg_fast.whole_file import replace_text

PROG = "python -m pseudoseg_fast.check"
OPTIONS = """Options are those of python -m pseudoseg_fast.train, of which data and model.in_channels count, --picture
and --save."""
SAVED = (
    *("root", "layout", "labeled", "unlabeled", "unlabeled_size", "reuse_labeled", "val", "classes", "tags"),
    *("background", "ignore_index", "label_map", "reduce_zero_label", "color_map"),
    *("mask_orientation", "white"),
)
"""The data options that say what the set is, and not what training makes of it."""
FILES = ("labeled", "unlabeled", "val", "classes", "tags", "label_map", "color_map")
"""Those of ``SAVED`` that may be files, as given or else below the root."""
EXAMPLES = 6


class _Collector(logging.Handler):
    """Puts what is logged into a report."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        kind = self.report.warnings if record.levelno >= logging.WARNING else self.report.notes
        kind.append(record.getMessage())


@contextlib.contextmanager
def logged_to(report: Report) -> Iterator[None]:
    """Put what reading logs, such as why a layout was taken, into the report."""
    package, handler = logging.getLogger("pseudoseg_fast"), _Collector(report)
    level = package.level
    package.setLevel(logging.INFO)
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def read_sets(
    config: DataConfig, root: Path, tree: Tree, report: Report
) -> tuple[dict[str, list[Sample]], Pool]:
    """Return the labelled, unlabelled and val pictures, and the pool that has the names of the unlabelled ones.

    A list that is wrong is reported and left out, and so are streamed pictures.
    """
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

    val = read(config.val, tree.val, lambda path: read_list(path, root, index=index))
    masked = apart_from(val, tree.labeled)
    labeled = read(config.labeled, masked, lambda path: read_list(path, root, index=index))
    rest = tree.without(val if config.reuse_labeled else [*labeled, *val], root)
    unlabeled = read(config.unlabeled, rest, lambda path: read_others(config, root, index, val, labeled))
    if not labeled and not config.labeled:
        report.errors.append(f"no training pictures with masks below {root}; give --data.labeled LIST")
    if not val and not config.val:
        report.errors.append(nothing_to_evaluate_on(config, root))
    if not unlabeled and not config.unlabeled:
        report.warnings.append("no unlabelled pictures: only --method.name supervised can train on this")
    if isinstance(unlabeled, Stream):
        report.warnings.append(f"pictures that are streamed are not read: {config.unlabeled}")
        pool: Pool = unlabeled
        others: list[Sample] = []
    else:
        others = [sample._replace(mask=None) for sample in unlabeled]
        pool = unlabeled if isinstance(unlabeled, ShardSamples) else pack(root, others)
    return {"labelled": [*labeled], "unlabelled": others, "val": [*val]}, pool


def scan_sets(
    sets: dict[str, list[Sample]], labels: Labels, channels: int, white: float | None
) -> tuple[dict[str, list[Scan]], NDArray[np.int64]]:
    """Read every file; return what each set holds, and [channels, 256] values of the training pictures."""
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


def find_channels(samples: Sequence[Sample]) -> int | None:
    """Return the number of channels of a few pictures, where they agree on one that is neither grey nor colour."""
    numbers = set()
    for sample in (samples[index] for index in spread(len(samples), EXAMPLES)):
        with contextlib.suppress(DataError):
            numbers.add(describe_file(sample.image).channels)
    return numbers.pop() if len(numbers) == 1 and not numbers & {1, 3} else None


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
    for sample in (samples[index] for index in spread(len(samples), EXAMPLES)):
        if sample.mask is None:
            continue
        image = read_image(sample.image, channels, config.white)
        image = visualize.as_color(image[..., None] if image.ndim == 2 else image)
        mask = visualize.colorize(read_mask(sample.mask, labels, sample.image), colors)
        rows.append([image, mask, np.round(image * 0.5 + mask * 0.5).astype(np.uint8)])
    mark = PngInfo()
    mark.add_text("Software", PROG)
    visualize.grid(rows, ["picture", "mask", "both"], classes, colors).save(path, pnginfo=mark)


def is_drawing(path: Path) -> bool:
    """Say whether a file is one that :func:`draw_samples` drew, by its mark; other formats than PNG have none."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == PROG
    except (OSError, ValueError):
        return False


def check(
    config: DataConfig,
    channels: int,
    picture: Path,
    report: Report,
    *,
    fixed: bool = False,
    saved: bool = False,
) -> dict[str, object]:
    """Read all files of a data set and report.

    Args:
        config: the data set.
        channels: of a picture, as configured.
        picture: where samples are drawn to.
        report: gets what is found.
        fixed: pictures of other channels are errors; else those of the pictures take the place of ``channels`` where
            they are neither grey nor colour.
        saved: the channels are written for training, which needs no word about them then.

    Returns:
        Channels, and unless they are three also mean and standard deviation, of the training pictures for the
        configuration of a model.

    Raises:
        DataError: the folder, the layout or the names of the classes cannot be read.
    """
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
        labels = conversion(config, root, tree, MAX_CLASSES)
    if classes:
        try:
            background_class(config.background, classes)
        except DataError as error:
            report.errors.append(str(error))
            config = dataclasses.replace(config, background="auto")
    sets, pool = read_sets(config, root, tree, report)
    every = [sample for part in sets.values() for sample in part]
    if every and not fixed and (found := find_channels(every)) not in (None, channels):
        (report.notes if saved else report.warnings).append(
            f"the pictures have {found} channels, the configuration {channels}: "
            + (f"--save writes {found}" if saved else f"train with --model.in_channels {found}")
        )
        channels = found
    scans, levels = scan_sets(sets, labels, channels, config.white)
    report_pictures(scans, channels, config.white, report)
    if config.short_side is None:
        report_crops(scans, config.crop_size, report)
    report_masks(scans, classes, labels, report)
    report_duplicates(scans, report)
    if config.tags and classes and len(pool):
        try:
            masked = [*sets["labelled"], *sets["val"]]
            tags = find_tags(config, root, tree, classes, labels, pool, masked)
        except DataError as error:
            report.errors.append(str(error))
        else:
            masks = [one.pixels[: len(classes)] > 0 for one in scans["labelled"] if one.pixels is not None]
            if masks:
                shares = np.mean(masks, axis=0).tolist()
                warn_of_untagged(tags, classes, background_class(config.background, classes), shares)
            report.notes.append(
                f"{config.tags} has tags of {len(tags)} pictures; which of them are streamed is not known"
                if isinstance(pool, Stream)
                else f"{len(tags)} of {len(pool)} unlabelled pictures have tags, which --config tagged learns from"
            )
    usable = [
        one.sample
        for name in ("labelled", "val")
        for one in scans[name]
        if not (one.problem or one.mask_problem)
    ]
    if classes and usable:
        try:
            draw_samples(usable, classes, labels, config, channels, picture)
        except (OSError, ValueError) as error:
            report.warnings.append(
                f"no samples could be drawn to {picture}: {error}; choose another --picture"
            )
        else:
            report.notes.append(f"samples: {picture}")
    if not levels.any():
        return {}
    dark = config.white is None and any(map(is_dark, (one for part in scans.values() for one in part)))
    return report_statistics(levels, report, dark=dark, saved=saved)


def report_statistics(
    levels: NDArray[np.int64], report: Report, *, dark: bool, saved: bool
) -> dict[str, object]:
    """Report mean and standard deviation of the training pictures.

    Args:
        levels: [channels, 256] pixels of each value.
        report: gets them.
        dark: pictures of more than 8 bits look too dark, so that ``data.white`` may change the values.
        saved: see :func:`check`.

    Returns:
        See :func:`check`.
    """
    channels = len(levels)
    mean, std = mean_and_std(levels)
    constant = (levels > 0).sum(1) == 1
    if constant.any():
        report.warnings.append(
            f"channels {', '.join(map(str, 1 + np.flatnonzero(constant)))} of {channels} have one value in all "
            "training pictures and can teach nothing; their standard deviation is taken to be 1"
        )
        std = np.where(constant, 1.0, std).tolist()
    note = f"training pictures have --model.mean {mean} --model.std {std}"
    if channels == 3:
        note += "; pretrained encoders want those that they were trained with, which are the default"
        note += ", and --save leaves it at that" if saved else ""
    report.notes.append(note)
    if dark:
        report.warnings.append(
            "with --data.white mean and standard deviation are others: run check again with it"
            + ("; they are not saved" if saved and channels != 3 else "")
        )
    if dark or channels == 3:
        return {"in_channels": channels}
    return {"in_channels": channels, "mean": mean, "std": std}


def save(path: Path, config: DataConfig, model: dict[str, object]) -> None:
    """Write a configuration for ``--config``, whole or not at all: what is set of the options in ``SAVED``.

    Args:
        path: the new file.
        config: the data set; its root is made absolute, and so are files named from the working directory.
        model: channels, and where they are not three perhaps mean and standard deviation.

    Raises:
        OSError: the file cannot be written.
    """
    root = config.root if config.root == DEMO else os.path.abspath(config.root)
    given, default = to_dict(config) | {"root": root}, to_dict(DataConfig(""))
    for name in FILES:
        if lies_here(name, given[name]):
            given[name] = os.path.abspath(given[name])
    values = {"data": {name: given[name] for name in SAVED if given[name] != default[name]}, "model": model}
    replace_text(path, yaml.safe_dump(values, sort_keys=False))


def lies_here(name: str, value: object) -> bool:
    """Say whether the value of an option is of a file, or of pictures, looked up from the working directory."""
    if not isinstance(value, str) or (name == "tags" and value == FROM_MASKS):
        return False
    if name != "unlabeled":
        return os.path.isfile(value)
    return os.path.exists(value) or (are_shards(value) and any(glob.glob(expand(value)[0])))


def prepare(picture: str, saved: str | None) -> tuple[Path, Path | None]:
    """Return where to write, and make the folders, before all is read.

    Raises:
        ValueError: the configuration is there already, a name is empty, or the picture is one that is not of ours.
        OSError: a folder cannot be made.
    """
    for option, name in (("--picture", picture), ("--save", saved)):
        if name == "":
            raise ValueError(f"{option} expects the name of a file, got an empty one; give {option} FILE")
    if os.path.isfile(picture) and not is_drawing(Path(picture)):
        raise ValueError(
            f"--picture is where samples are drawn to, and {picture} is there and is something else; remove "
            "it, or choose another name"
        )
    if saved and os.path.lexists(saved):
        raise ValueError(f"{saved} is there already; remove it, or choose another --save")
    for name in (picture, saved):
        if name:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
    return Path(picture), Path(saved) if saved else None


def printable(text: str) -> str:
    """Return a text with escapes for what file names hold that is no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; status 1 where the data set has errors, 2 for wrong options."""
    parser = make_parser(PROG, f"{__doc__} {OPTIONS}")
    parser.add_argument(
        "--picture", type=str, default="check.png", metavar="FILE", help="where samples are drawn to"
    )
    parser.add_argument(
        "--save",
        type=str,
        metavar="FILE",
        help="where to write, for --config of training, the data options that say what the set is (root, layout, "
        "lists, classes, tags, masks, white) and the pictures' channels, with mean and standard deviation unless they "
        "are three, for which the default is that of pretrained encoders",
    )
    arguments = sys.argv[1:] if arguments is None else arguments
    config, own = parse(parser, arguments)
    fixed = any(argument.partition("=")[0] == "--model.in_channels" for argument in arguments)
    report = Report()
    try:
        picture, saved = prepare(own.picture, own.save)
        try:
            with logged_to(report):
                model = check(
                    config.data, config.model.in_channels, picture, report, fixed=fixed, saved=bool(saved)
                )
        except DataError as error:
            model = {}
            report.errors.append(str(error))
        finally:
            print(printable(str(report)))
        if saved and model:
            save(saved, config.data, model)
            print(f"configuration: --config {saved}")
    except (ValueError, OSError) as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    return 1 if report.errors else 0


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
