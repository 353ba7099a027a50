"""Which tags the pictures of a run have: lines of a file, or what hidden masks show."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pseudoseg_fast.config import DataConfig
from pseudoseg_fast.data.labels import Labels, background_class
from pseudoseg_fast.data.layouts.tree import Tree
from pseudoseg_fast.data.lists import SHOWN, DataError, Index, Sample, read_list, shorten
from pseudoseg_fast.data.pool import Pool, is_folder
from pseudoseg_fast.data.shards import ShardSamples, are_shards, shard_name
from pseudoseg_fast.data.stream import Stream
from pseudoseg_fast.data.tags import FROM_MASKS, Tags, read_tags, tags_from_masks

logger = logging.getLogger(__name__)

ENOUGH = 20
"""Tagged pictures among which a class that most masks show should be."""


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


def warn_of_untagged(
    tags: Tags, classes: Sequence[str], background: int | None, shares: Sequence[float]
) -> None:
    """Warn of classes that most masks show and no tags name: tags forbid them in every label.

    Args:
        tags: of the unlabelled pictures.
        classes: names in the order of their ids.
        background: its id, which tags need not name, or None.
        shares: [C] of the labelled pictures that show each class.
    """
    if len(tags) < ENOUGH:
        return
    forgotten = [
        name
        for index, (name, shown, tagged) in enumerate(zip(classes, shares, tags.shares(), strict=True))
        if index != background and shown > 0.5 and not tagged
    ]
    if forgotten:
        logger.warning(
            "most masks show %s, and no line of data.tags names it, so that --config tagged forbids it in the labels "
            "of all %d tagged pictures: name it in their lines, or if it is the background, give --data.background ID",
            ", ".join(forgotten),
            len(tags),
        )
