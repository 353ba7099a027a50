"""From the configuration to the pictures, classes and labels of a run."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType

from pseudoseg_fast.config import DataConfig
from pseudoseg_fast.data.demo import demo_root
from pseudoseg_fast.data.labels import Color, Labels, read_color_map, read_label_map
from pseudoseg_fast.data.layouts import LISTS, guess, read_tree
from pseudoseg_fast.data.layouts.tree import Tree
from pseudoseg_fast.data.lists import (
    SHOWN,
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
from pseudoseg_fast.data.shards import ShardSamples, are_shards, shard_name
from pseudoseg_fast.data.stream import Stream
from pseudoseg_fast.data.tags import FROM_MASKS, Tags, read_tags, tags_from_masks

logger = logging.getLogger(__name__)

DEMO = "demo"
CLASSES = "classes.txt"


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
            "no labelled picture shows %s: nothing can teach %s",
            ", ".join(absent),
            "this class" if len(absent) == 1 else f"these {len(absent)} of {len(classes)} classes",
        )
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
    colors: dict[Color, int] = {}
    if config.color_map:
        colors, listed = read_color_map(config.color_map, root, names)
        names = names or listed
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
        raise DataError(f"no pictures with masks to evaluate on below {root}; give --data.val LIST")
    known: list[Sample] = []
    if labeled or (unlabeled and not config.unlabeled):
        known = (
            read_list(config.labeled, root, index=index) if config.labeled else apart_from(val, tree.labeled)
        )
        if both := len(known) - len(apart_from(val, known)):
            logger.warning(
                "%d of %d labelled pictures are val pictures, too: what is learnt from is no measure; take them off "
                "one of the lists",
                both,
                len(known),
            )
    if labeled and not known:
        raise DataError(f"no training pictures with masks below {root}; give --data.labeled LIST")
    others: Pool = Samples(root)
    if unlabeled and config.unlabeled:
        others = read_others(config, root, index, val, known)
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


def find_tags(
    config: DataConfig,
    root: Path,
    tree: Tree,
    classes: Sequence[str],
    labels: Labels,
    unlabeled: Pool,
    masked: Sequence[Sample],
) -> Tags:
    """Return the tags of the unlabelled pictures: those of a file, or those that their hidden masks show.

    Args:
        config: names the file.
        root: folder that its names are relative to, but for those of shards.
        tree: what the layout has found.
        classes: names that tags may be.
        labels: what the values in hidden masks mean.
        unlabeled: the pictures; of a stream, whose names nobody knows, all lines of its shards count that are not of
            ``masked`` ones.
        masked: labelled and val pictures, whose lines are left out without a word.

    Raises:
        DataError: the file is wrong or tags other pictures alone, a picture has no class though each of its pixels
            must have one, or no unlabelled picture has a mask.
    """
    if not config.tags:
        return Tags()
    if config.tags != FROM_MASKS:
        tags = _of_pictures(read_tags(config.tags, classes, root), unlabeled, masked, root, config)
        if background_class(config.background, classes) is None and (nothing := tags.without_classes()):
            raise DataError(
                f"{config.tags} tags {nothing[0]} and {len(nothing) - 1} other pictures with nothing, expected one "
                "class each at least, as there is no background class: fill in what they show, or take out the lines "
                "of those that nobody has looked at"
            )
        return tags
    if config.unlabeled and not (is_folder(config.unlabeled, root) or are_shards(config.unlabeled)):
        listed = read_list(config.unlabeled, root, "optional", Index(tree.samples, tree.image_end))
        hidden = {sample.name: sample for sample in listed if sample.mask}
    else:
        hidden = {sample.name: sample for sample in tree.samples if sample.mask}
    shown = {name: hidden[name] for name in unlabeled.names if name in hidden}
    if not shown:
        raise DataError(
            "data.tags masks expects unlabelled pictures whose masks exist, and none has one: name them in the second "
            "column of --data.unlabeled LIST, or give a --data.layout that knows them"
        )
    logger.info(
        "the hidden masks of %d of %d unlabelled pictures are read, for their tags alone",
        len(shown),
        len(unlabeled),
    )
    tags = tags_from_masks(list(shown.values()), labels)
    if background_class(config.background, classes) is None and (nothing := tags.without_classes()):
        logger.warning(
            "%d of their masks are ignored altogether: these pictures are not tagged", len(nothing)
        )
        tags = tags.only(set(tags) - set(nothing))
    return tags


def _of_pictures(
    tags: Tags, unlabeled: Pool, masked: Sequence[Sample], root: Path, config: DataConfig
) -> Tags:
    """Return the tags of the unlabelled pictures; a file may have masked ones, too, and be of a larger data set.

    Raises:
        DataError: they are of none, or of several with one name.
    """
    others = {sample.name for sample in masked}
    if isinstance(unlabeled, Stream):
        shards = Counter(map(shard_name, unlabeled.shards))
        places = ((name, shards[name.partition("/")[0]]) for name in tags if name not in others)
        known = Counter({name: count for name, count in places if count})
        example = f"{next(iter(shards))}/0007.jpg"
    else:
        tagged = set(tags)
        known = Counter(name for name in unlabeled.names if name in tagged)
        example = unlabeled[0].name
    if not known:
        raise DataError(
            f"{config.tags} tags no picture of {config.unlabeled or 'the unlabelled ones'}: its names must be "
            f"those of the unlabelled pictures, such as {example}, got {next(iter(tags))}"
        )
    repeated = [name for name, count in known.items() if count > 1]
    if repeated and are_shards(config.unlabeled or ""):  # a list may have a picture twice
        raise DataError(
            f"{config.tags} tags {len(repeated)} names that several pictures of {config.unlabeled} may have; rename "
            f"shards of one name, or members of one name, such as\n{shorten(repeated)}"
        )
    strange = [name for name in tags if name not in known and name not in others]
    # Whether each is there takes minutes to find out on a network file system; a few from all over say enough.
    looked_up = strange[:: math.ceil(len(strange) / SHOWN) or 1]
    if absent := [name for name in looked_up if not _is_there(name, unlabeled, root)]:
        logger.warning(
            "%s: %d of %d lines are of pictures that are not in use, and left out; %d of %d looked up do not exist; "
            "names must be those of the unlabelled pictures, such as %s, got\n%s",
            config.tags,
            len(strange),
            len(tags),
            len(absent),
            len(looked_up),
            example,
            shorten(absent),
        )
    return tags.only(known.keys())


def _is_there(name: str, unlabeled: Pool, root: Path) -> bool:
    """Say whether a name that is of no unlabelled picture is of a file, or of a shard beside those in use."""
    if os.path.isfile(root / name):
        return True
    if isinstance(unlabeled, Stream):
        return are_shards(name.partition("/")[0])  # nobody knows
    if not isinstance(unlabeled, ShardSamples):
        return False
    shards = {Path(shard) for shard in unlabeled.shards}
    beside = {shard.parent / name.partition("/")[0] for shard in shards}
    return any(shard.is_file() for shard in beside - shards)


def background_class(background: int | str | None, classes: Sequence[str]) -> int | None:
    """Return the id of the background class; "auto" looks for a class of the name background.

    Raises:
        DataError: there is no class of that id.
    """
    if isinstance(background, str):
        return next((index for index, name in enumerate(classes) if name.casefold() == "background"), None)
    if background is not None and not 0 <= background < len(classes):
        raise DataError(
            f"data.background expects a class id from 0 to {len(classes) - 1}, auto or null, got {background}"
        )
    return background
