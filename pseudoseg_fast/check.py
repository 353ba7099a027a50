"""Read a whole data set and say what is wrong with it: ``python -m pseudoseg_fast.check --data.root DIR``."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from pseudoseg_fast import visualize
from pseudoseg_fast.config import DataConfig, Parser, to_dict
from pseudoseg_fast.data.decode import read_image
from pseudoseg_fast.data.findings import Report, report_duplicates, report_masks, report_pictures
from pseudoseg_fast.data.labels import MAX_CLASSES, Labels
from pseudoseg_fast.data.layouts.tree import Tree
from pseudoseg_fast.data.lists import DataError, Index, Sample, read_list, shorten
from pseudoseg_fast.data.pool import read_unlabeled
from pseudoseg_fast.data.read import read_mask
from pseudoseg_fast.data.scan import Scan, mean_and_std, scan
from pseudoseg_fast.data.sets import DEMO, background_class, data_root, find_tree, read_labels
from pseudoseg_fast.data.shards import are_remote

EXAMPLES = 6


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
    unlabeled = (
        [] if streamed else read(config.unlabeled, rest, lambda path: read_unlabeled(path, root, index))
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
