"""What a layout finds in a data set's folder, and how pictures and masks are brought together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from pseudoseg_fast.data.listing import list_pictures
from pseudoseg_fast.data.lists import DataError, Sample, shorten
from pseudoseg_fast.data.samples import Joined, Names, Samples


@dataclass(frozen=True)
class Tree:
    """The pictures of a data set as its folders say, each list sorted as the layout has it.

    Args:
        labeled: training pictures with masks.
        unlabeled: training pictures that are not labelled.
        val: pictures with masks to evaluate on.
        orphans: masks without a picture.
        unmasked: pictures to evaluate on whose masks are missing.
        classes: names of the classes, where the layout knows them.
        drawn: the masks were drawn with the ids of ``classes``; where others say what the classes are, these are found
            by name.
        colors: colour (r, g, b) of each class in the mask files, where these hold colours.
        label_map: ids in the mask files to class ids, see :class:`~pseudoseg_fast.data.labels.Labels`.
        map_only: shell pattern of the masks that ``label_map`` is for.
        reduce_zero_label: id 0 means ignored, and the others count from 1.
        image_end: what the names of all pictures end with before their suffix.
    """

    labeled: list[Sample] = field(default_factory=list)
    unlabeled: Sequence[Sample] = ()
    val: list[Sample] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)
    unmasked: Sequence[Sample] = ()
    classes: Sequence[str] | None = None
    drawn: bool = False
    colors: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    label_map: Mapping[int, int] = field(default_factory=dict)
    map_only: str = "*"
    reduce_zero_label: bool = False
    image_end: str = ""

    @property
    def samples(self) -> Joined:
        """All pictures."""
        return Joined(self.labeled, self.unlabeled, self.val)

    def without(self, taken: Sequence[Sample], root: Path) -> Samples:
        """Return the training pictures that are not taken, sorted and without masks."""
        known = {sample.name for sample in taken}
        parts = (
            part.names if isinstance(part, Samples) else [sample.name for sample in part]
            for part in (self.labeled, self.unlabeled)
        )
        return Samples(root, Names.of(sorted(name for part in parts for name in part if name not in known)))


@dataclass(frozen=True)
class Pairs:
    """Pictures of a folder, sorted by name.

    Args:
        labeled: those with a mask.
        unlabeled: those without.
        orphans: masks without a picture.
    """

    labeled: list[Sample] = field(default_factory=list)
    unlabeled: Samples = field(default_factory=Samples)
    orphans: list[Path] = field(default_factory=list)


def pair(
    root: Path, images: Path, masks: Path | None, image_end: str = "", mask_ends: Sequence[str] = ("",)
) -> Pairs:
    """Pair the pictures below one folder with the masks of the same relative path, suffixes aside, below another.

    Args:
        root: the data set's root, which names are relative to.
        images: folder of the pictures, below ``root``.
        masks: folder of the masks; None or a missing one gives no masks.
        image_end: end of the pictures' stems that masks do not have; files without it are left out.
        mask_ends: ends of the masks' stems that pictures do not have; the first that is there counts.

    Raises:
        DataError: there is no folder ``images``, or two pictures could be meant by one mask.
    """
    above = prefix(root, images)
    if masks is None or not masks.is_dir():
        names = [name for name in pictures(images) if _stem(name).endswith(image_end)]
        return Pairs(unlabeled=Samples(root, Names.of(f"{above}{name}" for name in names)))
    files = pictures(masks)
    found = [stems(masks, files, end) for end in mask_ends]
    labeled, unlabeled, taken = [], [], set()
    for stem, name in stems(images, pictures(images), image_end).items():
        mask = next((names[stem] for names in found if stem in names), None)
        if mask is None:
            unlabeled.append(f"{above}{name}")
        else:
            labeled.append(Sample(f"{above}{name}", images / name, masks / mask))
            # Where ends include the empty one, a mask of another end is there under its own stem, too.
            taken.add(mask)
    orphans = {name for names in found for name in names.values() if name not in taken}
    return Pairs(
        sorted(labeled), Samples(root, Names.of(sorted(unlabeled))), sorted(masks / name for name in orphans)
    )


def stems(folder: Path, files: Iterable[str], end: str = "") -> dict[str, str]:
    """Return the pictures below a folder by their names without ``end`` and suffix; others are left out.

    Args:
        folder: where they lie.
        files: the pictures, relative to it.
        end: of the stems that are meant.

    Raises:
        DataError: two files have one stem.
    """
    found: dict[str, str] = {}
    clashes: list[str] = []
    for name in files:
        stem = _stem(name)
        if not stem.endswith(end):
            continue
        stem = stem.removesuffix(end)
        if stem in found:
            clashes.append(f"{folder / found[stem]} and {os.path.basename(name)}")
        found[stem] = name
    if clashes:
        raise DataError(
            f"{len(clashes)} names below {folder} are shared by two files, and a mask of that name could be of either; "
            f"rename or remove one of each:\n{shorten(clashes)}"
        )
    return found


def pictures(folder: Path) -> Names:
    """Return the pictures below a folder, relative to it.

    Raises:
        DataError: there is no such folder.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; {_around(folder)}")
    return list_pictures(folder)


def prefix(root: Path, folder: Path) -> str:
    """Return what the names of pictures in a folder below ``root`` begin with."""
    return "" if folder == root else f"{folder.relative_to(root).as_posix()}/"


def together(root: Path, *parts: Samples) -> Samples:
    """Return the samples of all parts, one after the other."""
    return Samples(root, Names.of(name for part in parts for name in part.names))


def first_folder(root: Path, *names: str) -> Path | None:
    """Return the first of the folders that is there."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def class_names(name: str) -> list[str]:
    """Return the class names of a published data set that come with the package."""
    return resources.files("pseudoseg_fast.data.classes").joinpath(f"{name}.txt").read_text().splitlines()


def _around(folder: Path) -> str:
    """Say what is there in place of a missing folder."""
    above = next((parent for parent in folder.parents if parent.is_dir()), Path("/"))
    names = sorted(entry.name for entry in os.scandir(above))
    return f"{above} holds {', '.join(names[:12]) or 'nothing'}{', ...' if len(names) > 12 else ''}"


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]
