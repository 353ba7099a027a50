"""Choose which pictures with masks to learn from and which to evaluate on, as lists.

python -m pseudoseg_fast.split --data.root DIR --val 5
python -m pseudoseg_fast.split --data.root DIR --labeled 1/16 1/8
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pseudoseg_fast.config import DataConfig, Parser
from pseudoseg_fast.data.lists import DataError, Index, Sample, read_list, shorten
from pseudoseg_fast.data.pool import is_folder, read_unlabeled
from pseudoseg_fast.data.read import check_masks
from pseudoseg_fast.data.samples import Samples
from pseudoseg_fast.data.sets import apart_from, data_root, find_tree, read_labels
from pseudoseg_fast.data.shards import are_shards
from pseudoseg_fast.stop import end_quietly

Pixels = NDArray[np.int64]

LISTS = ("labeled", "unlabeled", "val")


def covering_order(pixels: Pixels, seed: int) -> tuple[list[int], int]:
    """Return an order of pictures whose beginnings are nested splits, and how many of them show every class.

    First come pictures for the classes, the rarest first: a random one of those that show it, unless one is there
    already. All others follow in random order.

    Args:
        pixels: [N, C] labelled pixels per picture and class; classes without any are left out of account.
        seed: decides the order.
    """
    random = np.random.default_rng(seed)
    shown = pixels > 0
    order: list[int] = []
    covered: NDArray[np.bool_] = np.logical_not(shown.any(0))
    for index in np.argsort(shown.sum(0), kind="stable"):
        if not covered[index]:
            order.append(int(random.choice(np.flatnonzero(shown[:, index]))))
            covered = covered | shown[order[-1]]
    chosen = set(order)
    return order + [int(index) for index in random.permutation(len(pixels)) if index not in chosen], len(
        order
    )


def hold_out(pixels: Pixels, count: int, seed: int) -> list[int]:
    """Choose pictures to evaluate on, and leave each class in another picture.

    First come pictures for the classes, the rarest first, of those that two pictures show; the rest are random.

    Args:
        pixels: [N, C] labelled pixels per picture and class.
        count: how many.
        seed: decides which.

    Returns:
        Indices of ``count`` pictures, ascending.

    Raises:
        ValueError: so many cannot be held out.
    """
    random = np.random.default_rng(seed)
    shown = pixels > 0
    left = shown.sum(0)
    order = random.permutation(len(pixels))
    chosen: dict[int, None] = {}

    def take_first(candidates: NDArray[np.int64]) -> None:
        """Take the first of them that is not taken and shows no class that no other picture left shows."""
        for index in map(int, candidates):
            if index not in chosen and (left[shown[index]] > 1).all():
                chosen[index] = None
                left[shown[index]] -= 1
                return

    for label in np.argsort(left, kind="stable"):
        if len(chosen) < count and not shown[[*chosen], label].any():
            take_first(order[shown[order, label]])
    # Pictures that cannot be taken stay so, and what is left only shrinks: one look at each is enough.
    for place in range(len(order)):
        if len(chosen) < min(count, len(order) - 1):
            take_first(order[place : place + 1])
    if len(chosen) < count:
        raise ValueError(
            f"--val {count}: of the {len(pixels)} pictures with masks {len(chosen)} can be held out, so that each "
            "class stays in one to learn from; "
            + ("choose a smaller number, or another --seed" if chosen else "draw more masks")
        )
    return sorted(chosen)


def how_many(text: str, total: int, option: str) -> int:
    """Return the number of pictures that a share such as 1/16 or 0.05, or a number such as 50, means.

    Args:
        text: what was given.
        total: number of pictures to choose from.
        option: what it was given to, for the message.

    Raises:
        ValueError: it is neither, or not between 1 and ``total``.
    """
    try:
        share = Fraction(text)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    count = round(share * total) if share < 1 or text.strip() == "1/1" else int(share)
    if share <= 0 or not 1 <= count <= total or (share > 1 and share.denominator != 1):
        raise ValueError(
            f"{option} expects a share of the {total} pictures with masks, such as 1/16, or a number of them, such as "
            f"50; got {text!r}"
        )
    return count


def coverage(classes: Sequence[str], splits: dict[str, Pixels]) -> str:
    """Return a table: for each class the pictures that show it, and its share of pixels, in each split [n, C]."""
    width = max(len(name) for name in (*classes, "pictures"))
    heads = [f"{name}: pictures  pixels %" for name in splits]
    lines = [f"{'class':<{width}}  " + "  ".join(heads)]
    for index, name in enumerate(classes):
        cells = []
        for head, pixels in zip(heads, splits.values(), strict=True):
            share = 100 * pixels[:, index].sum() / max(1, pixels.sum())
            cells.append(f"{(pixels[:, index] > 0).sum():>{len(head) - 10}}  {share:>8.2f}")
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    totals = [
        f"{len(pixels):>{len(head) - 10}}  {'':>8}"
        for head, pixels in zip(heads, splits.values(), strict=True)
    ]
    return "\n".join([*lines, f"{'pictures':<{width}}  " + "  ".join(totals)])


def write_lists(folder: Path, root: Path, lists: Mapping[str, Sequence[Sample]]) -> None:
    """Write lists into a new folder, which is there whole or not at all.

    Args:
        folder: gets a file NAME.txt for each list that is not empty.
        root: folder that names are relative to.
        lists: samples by the list's name, with masks or without.

    Raises:
        ValueError: the folder is there already, or a name cannot be told from others in a list.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; remove it, or choose another --output")
    columns = {
        f"{name}.txt": [(sample.name, relative(sample.mask, root)) for sample in samples]
        for name, samples in lists.items()
        if samples
    }
    names = (column for rows in columns.values() for row in rows for column in row)
    if wrong := [repr(name) for name in names if not can_be_listed(name)]:
        raise ValueError(
            f"{len(wrong)} names cannot be written to a list; expected UTF-8 without tabs and line breaks, without # "
            f"at the start and white space at the ends; rename these files:\n{shorten(wrong)}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        for name, rows in columns.items():
            # A single column with spaces ends with a tab, so that it is read as one.
            tab = any(len(column.split()) > 1 for row in rows for column in row)
            lines = ["\t".join(row) if tab else " ".join(row).rstrip() for row in rows]
            (partial / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        partial.chmod(0o755)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def can_be_listed(name: str) -> bool:
    """Say whether a list gives a file's name back as it is."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return name == name.strip() and not name.startswith("#") and not any(end in name for end in "\t\r\n")


def relative(mask: Path | None, root: Path) -> str:
    """Return a mask's path as lists have it; nothing without one, or for one outside the root, which layouts know."""
    if mask is None or not mask.is_relative_to(root):
        return ""
    return Path(os.path.relpath(mask, root)).as_posix()


def listable(path: str, root: Path, index: Index) -> Samples:
    """Return unlabelled pictures that a list can name.

    Raises:
        DataError: they lie in shards or outside the root.
    """
    others = None if are_shards(path) and not is_folder(path, root) else read_unlabeled(path, root, index)
    if not isinstance(others, Samples) or others.folder != root:
        raise DataError(
            f"lists name pictures below {root}, and those of --data.unlabeled {path} lie outside it: leave the option "
            "out here, and give it to training, in the place of the list unlabeled.txt"
        )
    return others


def split(
    config: DataConfig, shares: Sequence[str], seed: int, output: Path, val_share: str | None = None
) -> str:
    """Write a folder of lists for each share; return the table of their classes.

    Args:
        config: names the pictures.
        shares: of the pictures with masks that are not held out, which keep them.
        seed: decides which.
        output: folder that gets the folders.
        val_share: of the pictures with masks, to hold out for evaluation; None takes the val pictures there are.

    Raises:
        ValueError: a share is none, a split is too small to show every class, a folder is there already, or a name
            cannot be listed.
    """
    root = data_root(config)
    layout, tree = find_tree(config, root)
    classes, labels = read_labels(config, root, tree)
    index = Index(tree.samples, tree.image_end)
    val = read_list(config.val, root, index=index) if config.val else tree.val
    masked = read_list(config.labeled, root, index=index) if config.labeled else tree.labeled
    pool = sorted(apart_from(val, masked))
    if not pool:
        raise DataError(
            f"no training pictures with masks below {root} that are not val pictures; give --data.labeled LIST"
        )
    others = listable(config.unlabeled, root, index) if config.unlabeled else tree.without(val, root)
    pixels = check_masks(pool, labels)
    splits = {"all": pixels}
    if val_share is not None:
        if val:
            source = config.val or f"by the layout {layout}"
            raise ValueError(f"{root} has {len(val)} val pictures already, {source}; leave --val out")
        held_out = hold_out(pixels, how_many(val_share, len(pool), "--val"), seed)
        val = [pool[index] for index in held_out]
        splits["val"] = pixels[held_out]
        pool, pixels = apart_from(val, pool), np.delete(pixels, held_out, axis=0)
    order, needed = covering_order(pixels, seed)
    counts = {share.replace("/", "_"): how_many(share, len(pool), "--labeled") for share in shares}
    for name, count in counts.items():
        if count < needed:
            raise ValueError(
                f"{count} pictures ({name}) cannot show every class with seed {seed}, {needed} can; choose a larger "
                "share or another --seed"
            )
        if (output / name).exists():
            raise ValueError(f"{output / name} is there already; remove it, or choose another --output")
    for name, count in counts.items():
        labeled = [pool[place] for place in sorted(order[:count])]
        taken = {sample.image for sample in [*labeled, *val]}
        rest = {sample.image: sample for sample in [*pool, *others] if sample.image not in taken}
        unlabeled = [sample._replace(mask=None) for sample in rest.values()]
        lists = {"labeled": labeled, "unlabeled": sorted(unlabeled, key=lambda sample: sample.name)}
        write_lists(output / name, root, lists | ({"val": val} if val_share is not None else {}))
        splits[name] = pixels[order[:count]]
    return coverage(classes, splits)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input ends with a message and status 2."""
    parser = Parser(prog="python -m pseudoseg_fast.split", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--labeled",
        type=str,
        nargs="+",
        default=[],
        help="shares of the pictures with masks, 1/16, or numbers, 50, that keep them; with --val alone all do",
    )
    parser.add_argument(
        "--val",
        type=str,
        help="share or number of the pictures with masks to hold out for evaluation, where there are no val pictures",
    )
    parser.add_argument("--seed", type=int, default=0, help="decides which; splits of one seed are nested")
    parser.add_argument(
        "--output", type=str, default="splits", help="folder that gets a folder for each share"
    )
    parser.add_class_arguments(DataConfig, "data", help="the pictures to choose from: those labelled")
    options = parser.instantiate(parser.parse_args(sys.argv[1:] if arguments is None else arguments))
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("pseudoseg_fast").setLevel(logging.INFO)
    if not options.labeled and options.val is None:
        parser.error(
            "expected --val NUMBER, to hold out pictures for evaluation, or --labeled SHARE, or both"
        )
    shares = options.labeled or ["1/1"]
    try:
        print(split(options.data, shares, options.seed, Path(options.output), options.val))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for share in shares:
        folder = Path(options.output, share.replace("/", "_"))
        lists = [name for name in LISTS if (folder / f"{name}.txt").exists()]
        given = [f"--data.{name} {shlex.quote(str(folder / f'{name}.txt'))}" for name in lists]
        alone = [] if "unlabeled" in lists else ["--method.name supervised"]
        print(" ".join([*given, *alone]))
    return 0


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
