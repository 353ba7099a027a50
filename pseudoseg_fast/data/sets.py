"""From the configuration to the pictures, classes and labels of a run."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from pseudoseg_fast.config import DataConfig
from pseudoseg_fast.data.demo import demo_root
from pseudoseg_fast.data.labels import Color, Labels, background_class, read_color_map, read_label_map
from pseudoseg_fast.data.layouts import LISTS, guess, read_tree
from pseudoseg_fast.data.layouts.tree import Tree
from pseudoseg_fast.data.lists import (
    DataError,
    File,
    Index,
    Sample,
    read_classes,
    read_list,
    shorten,
)
from pseudoseg_fast.data.pool import Pool, is_folder, read_unlabeled
from pseudoseg_fast.data.read import check_masks
from pseudoseg_fast.data.samples import Joined, Names, Samples
from pseudoseg_fast.data.tagged import find_tags, warn_of_untagged
from pseudoseg_fast.data.tags import Tags

logger = logging.getLogger(__name__)

DEMO = "demo"
CLASSES = "classes.txt"
_COMPARED = 1_000_000


@dataclass(frozen=True)
class Data:
    """The pictures of a run.

    Args:
        root: folder that the names of pictures start from.
        layout: how the folder is arranged.
        classes: names in the order of their ids.
        labels: what the values in mask files mean.
        background: id of the background class, or None.
        val: pictures with masks to evaluate on.
        labeled: pictures with masks to learn from.
        unlabeled: pictures to learn from without masks.
        tags: classes of tagged pictures, by the picture's name.
        pixels: labelled pixels of each class, [C], in the labelled pictures.
        shown: labelled pictures that show each class, [C].
        val_pixels: labelled pixels of each class, [C], in the val pictures.
    """

    root: Path
    layout: str
    classes: list[str]
    labels: Labels
    background: int | None
    val: list[Sample]
    labeled: list[Sample]
    unlabeled: Pool
    tags: Tags
    pixels: list[int]
    shown: list[int]
    val_pixels: list[int]

    @property
    def pictures(self) -> int:
        """Number of different pictures to learn from."""
        inside = isinstance(self.unlabeled, Samples) and self.unlabeled.folder == self.root
        known = {sample.name for sample in self.labeled} if inside else set()
        return len(self.labeled) + len(self.unlabeled) - sum(name in known for name in self.unlabeled.names)


def read_data(config: DataConfig, *, labeled: bool = True, unlabeled: bool = True) -> Data:
    """Read what a configuration and the layout say, and check that the pictures are there and their masks fit.

    Args:
        config: names of the folder and the lists.
        labeled: read the labelled pictures, too; not needed to evaluate.
        unlabeled: read the unlabelled pictures and the tags, too.

    Raises:
        DataError: a list, picture or mask is missing or does not fit; the message names it.
    """
    root = data_root(config)
    layout, tree = find_tree(config, root)
    classes, labels = read_labels(config, root, tree)
    known, others, val = read_samples(config, root, tree, labeled=labeled, unlabeled=unlabeled)
    pixels = check_masks([*known, *val], labels, {sample.image for sample in val})
    data = Data(
        root=root,
        layout=layout,
        classes=classes,
        labels=labels,
        background=background_class(config.background, classes),
        val=val,
        labeled=known,
        unlabeled=others,
        tags=find_tags(config, root, tree, classes, labels, others, [*known, *val]) if unlabeled else Tags(),
        pixels=pixels[: len(known)].sum(0).tolist(),
        shown=(pixels[: len(known)] > 0).sum(0).tolist(),
        val_pixels=pixels[len(known) :].sum(0).tolist(),
    )
    if data.labeled and (
        absent := [name for name, count in zip(classes, data.pixels, strict=True) if not count]
    ):
        logger.warning(
            "no labelled picture shows %s: the network cannot learn %s",
            ", ".join(absent),
            "this class" if len(absent) == 1 else f"these {len(absent)} of {len(classes)} classes",
        )
    if data.labeled:
        shares = [shown / len(data.labeled) for shown in data.shown]
        warn_of_untagged(data.tags, data.classes, data.background, shares)
    return data


def data_root(config: DataConfig) -> Path:
    """Return the folder of the data set.

    Raises:
        DataError: there is none.
    """
    root = demo_root() if config.root == DEMO else Path(config.root)
    if not root.is_dir():
        raise DataError(
            f"data.root expects a folder, or {DEMO} for the embedded data set; there is no folder {root}"
        )
    return Path(os.path.abspath(root))


def find_tree(config: DataConfig, root: Path) -> tuple[str, Tree]:
    """Return the layout that is given or obvious, and what it finds.

    Raises:
        DataError: none is obvious, or the folder is not arranged as the given one says.
    """
    listed = bool(config.labeled and config.val)
    layout: str = config.layout
    if layout == "auto":
        layout, why = guess(root, lists=listed, complete=listed and bool(config.unlabeled))
        logger.info("taking %s for the layout %s, since %s; --data.layout says otherwise", root, layout, why)
    try:
        tree = read_tree(layout, root)
    except DataError as error:
        if not (listed and config.layout == "auto" and layout == "folder"):
            raise
        logger.warning("%s\nthe lists are taken alone: --data.layout %s", error, LISTS)
        layout, tree = LISTS, Tree()
    if tree.orphans and not listed:
        logger.warning(
            "%d masks have no picture, such as\n%s\nname both alike, or remove them",
            len(tree.orphans),
            shorten([str(path) for path in tree.orphans]),
        )
    if tree.unmasked and not config.val:
        logger.warning(
            "%d pictures to evaluate on have no mask and are left out, such as\n%s",
            len(tree.unmasked),
            shorten([sample.name for sample in tree.unmasked]),
        )
    return layout, tree


def read_labels(config: DataConfig, root: Path, tree: Tree) -> tuple[list[str], Labels]:
    """Return the names of the classes and what the values in mask files mean.

    Raises:
        DataError: nothing says what the classes are, or a conversion does not fit them.
    """
    names: Sequence[str] | None = tree.classes
    if config.classes:
        names = read_classes(config.classes, root)
    elif (root / CLASSES).is_file():
        names = read_classes(root / CLASSES)
        if tree.classes is not None and names != [*tree.classes]:
            logger.info("the %d classes are those of %s, not the layout's", len(names), root / CLASSES)
    if tree.drawn and names and not config.label_map and config.reduce_zero_label is None:
        tree = by_name(tree, names)
    colors: dict[Color, int] = {}
    if config.color_map:
        colors, listed = read_color_map(config.color_map, root, names)
        names = names or listed
    elif tree.colors and not config.label_map and config.reduce_zero_label is None:
        colors = colors_of(tree.colors, names or ())
    elif tree.colors:
        logger.warning(
            "the layout's colours are left out, since data.label_map or data.reduce_zero_label says that masks hold ids"
        )
    if not names:
        raise DataError(
            f"expected the names of the classes, one a line in the order of their ids: put them into {root / CLASSES} "
            "or give --data.classes FILE"
        )
    if len(names) == 1:
        raise DataError(
            f"expected two classes at least, got {names[0]} alone: name what is not {names[0]}, too"
            + ("" if names[0] == "background" else ", such as background")
            + ", in the order of the ids (in masks drawn in black and white the black one is 0)"
        )
    return list(names), conversion(config, root, tree, len(names), colors)


def by_name(tree: Tree, names: Sequence[str]) -> Tree:
    """Return a tree whose masks were drawn with ids of its own, for classes of these names.

    As many names as the layout has, but others, are new names of its classes, in their order.

    Raises:
        DataError: classes of the layout are missing, and it is not that they have new names.
    """
    assert tree.classes is not None
    missing = [name for name in tree.classes if name not in names]
    moved = any(name in names and names.index(name) != index for index, name in enumerate(tree.classes))
    if missing and (moved or len(names) != len(tree.classes)):
        raise DataError(
            f"the annotations are of the classes {', '.join(tree.classes)}, and the {len(names)} given ones lack "
            f"{', '.join(missing)}: name all of them, in any order; or new names for all, in their order; or say with "
            "--data.label_map what becomes of each"
        )
    if missing:
        return tree
    return replace(
        tree,
        classes=names,
        label_map={index: names.index(name) for index, name in enumerate(tree.classes)},
    )


def colors_of(colors: Mapping[str, Color], names: Sequence[str]) -> dict[Color, int]:
    """Return the class id that each colour of a layout means.

    Raises:
        DataError: the classes have other names than the layout's.
    """
    if missing := [name for name in colors if name not in names]:
        raise DataError(
            f"the masks have colours of the classes {', '.join(colors)}, and data.classes lacks {', '.join(missing)}: "
            "name all of them, in any order, or say what each colour means with --data.color_map FILE"
        )
    return {color: names.index(name) for name, color in colors.items()}


def conversion(
    config: DataConfig,
    root: Path,
    tree: Tree,
    classes: int,
    color_map: Mapping[Color, int] = MappingProxyType({}),
) -> Labels:
    """Return what the values in mask files mean.

    Colours and ``reduce_zero_label`` take the place of what the layout converts. So does ``label_map``, unless there
    are as many classes as the layout has, whose ids it then leads to, whatever their names: it is laid over that. With
    another number of classes ids count from 0, also where the layout's own classes count from 1.

    Args:
        config: what is given.
        root: folder that files are relative to.
        tree: what the layout has found.
        classes: number of classes.
        color_map: colours that are given.

    Raises:
        DataError: it does not fit the classes.
    """
    label_map = read_label_map(config.label_map, root)
    own = tree.classes is None or len(tree.classes) != classes
    replaced = bool(color_map) or config.reduce_zero_label is not None or bool(label_map and own)
    if tree.reduce_zero_label and own and not replaced:
        logger.info(
            "ids in the masks are taken to count from 0, since the %d classes are not those of the layout, whose masks "
            "count from 1 and ignore 0; where these do, too, give --data.reduce_zero_label true",
            classes,
        )
    return Labels(
        classes,
        ignore_index=config.ignore_index,
        label_map=label_map,
        layout_map={} if replaced else tree.label_map,
        map_only=tree.map_only,
        reduce_zero_label=bool(config.reduce_zero_label) if replaced else tree.reduce_zero_label and not own,
        color_map=color_map,
        stored=config.mask_orientation == "stored",
    )


def read_samples(
    config: DataConfig, root: Path, tree: Tree, *, labeled: bool = True, unlabeled: bool = True
) -> tuple[list[Sample], Pool, list[Sample]]:
    """Return the labelled, unlabelled and val pictures: those of the lists, or else those of the layout.

    Raises:
        DataError: a list is wrong, or neither it nor the layout names a picture that is needed.
    """
    index = Index(tree.samples, tree.image_end)
    val = read_list(config.val, root, index=index) if config.val else tree.val
    if not val:
        raise DataError(nothing_to_evaluate_on(config, root))
    known: list[Sample] = []
    if labeled or (unlabeled and not config.unlabeled):
        known = (
            read_list(config.labeled, root, index=index) if config.labeled else apart_from(val, tree.labeled)
        )
        if both := len(known) - len(apart_from(val, known)):
            logger.warning(
                "%d of %d labelled pictures are val pictures, too: scores on training pictures mean nothing; take them "
                "off one of the lists",
                both,
                len(known),
            )
    if labeled and not known:
        raise DataError(f"no training pictures with masks below {root}; give --data.labeled LIST")
    others: Pool = Samples(root)
    if unlabeled and config.unlabeled:
        others = read_others(config, root, index, val, known)
        if not config.labeled:
            tell_of_unused(tree.unlabeled, others)
    elif unlabeled:
        others = tree.without(val if config.reuse_labeled else [*known, *val], root)
        if config.labeled and not config.reuse_labeled:
            logger.info("unlabelled are the %d pictures of %s that no list names", len(others), root)
        if not others:
            raise DataError(
                "method.name pseudoseg learns from unlabelled pictures: give --data.unlabeled LIST_OR_DIR, or "
                "--method.name supervised to go without; with --data.labeled LIST the other training pictures of a "
                "layout are unlabelled"
            )
    return known if labeled else [], others, val


def tell_of_unused(found: Sequence[Sample], others: Pool) -> None:
    """Log how many of the unlabelled pictures that a layout has found are not among the given ones."""
    if not isinstance(others, Samples) or len(found) + len(others) > _COMPARED:
        return
    given = {sample.image for sample in others}
    if unused := sum(sample.image not in given for sample in found):
        logger.info(
            "%d training pictures without a mask are not used, since data.unlabeled does not name them",
            unused,
        )


def nothing_to_evaluate_on(config: DataConfig, root: Path) -> str:
    """Return that there are no val pictures, and how to come by them."""
    labeled = f" --data.labeled {shlex.quote(config.labeled)}" if config.labeled else ""
    return (
        f"no pictures with masks to evaluate on below {root}; hold some out, python -m pseudoseg_fast.split "
        f"--data.root {shlex.quote(config.root)}{labeled} --val 5, or give --data.val LIST, a picture's name a line"
    )


def apart_from(val: Sequence[Sample], samples: Sequence[Sample]) -> list[Sample]:
    """Return the samples whose pictures are none to evaluate on."""
    held_out = {sample.image for sample in val}
    return [sample for sample in samples if sample.image not in held_out]


def read_others(
    config: DataConfig, root: Path, index: Index, val: Sequence[Sample], labeled: Sequence[Sample] = ()
) -> Pool:
    """Return the unlabelled pictures that ``config.unlabeled`` names, but for those to evaluate on and known masks.

    Args:
        config: names a list, a folder or shards; masks are looked for in a folder alone.
        root: folder that names are relative to.
        index: what the layout has found.
        val: pictures with masks to evaluate on.
        labeled: pictures with masks to learn from.

    Raises:
        DataError: as :func:`~pseudoseg_fast.data.pool.read_unlabeled`, or no others are left.
    """
    if not config.unlabeled:
        raise ValueError("data.unlabeled expects a list, a folder or shards, got nothing")
    pool = read_unlabeled(config.unlabeled, root, index, config.unlabeled_size)
    if not isinstance(pool, Samples):
        return pool
    files: dict[str, set[File]] = {"val pictures": {sample.image for sample in val}}
    if is_folder(config.unlabeled, root):
        parts = index.samples.parts if isinstance(index.samples, Joined) else (index.samples,)
        known = chain(*(part for part in parts if not isinstance(part, Samples)), val, labeled)
        files["masks"] = {sample.mask for sample in known if sample.mask}
    for kind, paths in files.items():
        left_out = {
            path.relative_to(pool.folder).as_posix()
            for path in paths
            if isinstance(path, Path) and path.is_relative_to(pool.folder)
        }
        if left_out.isdisjoint(pool.names):
            continue
        others = Samples(pool.folder, Names.of(name for name in pool.names if name not in left_out))
        if not others:
            raise DataError(f"{config.unlabeled} names {kind} alone; expected pictures to learn from")
        logger.warning(
            "%d of %d pictures of %s are %s, and left out",
            len(pool) - len(others),
            len(pool),
            config.unlabeled,
            kind,
        )
        pool = others
    return pool
