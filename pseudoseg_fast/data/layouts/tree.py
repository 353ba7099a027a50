"""What a layout finds in a data set's folder, and how pictures and masks are brought together."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from pseudoseg_fast.data.lists import IMAGE_SUFFIXES, DataError, Sample, shorten, walk


@dataclass(frozen=True)
class Tree:
    """The pictures of a data set as its folders say, each list sorted as the layout has it.

    Args:
        labeled: training pictures with masks.
        unlabeled: training pictures that are not labelled.
        val: pictures with masks to evaluate on.
        orphans: masks without a picture.
        classes: names of the classes, where the layout knows them.
        label_map: ids in the mask files to class ids, see :class:`~pseudoseg_fast.data.labels.Labels`.
        map_only: shell pattern of the masks that ``label_map`` is for.
        reduce_zero_label: id 0 means ignored, and the others count from 1.
        image_end: what the names of all pictures end with before their suffix.
    """

    labeled: list[Sample] = field(default_factory=list)
    unlabeled: list[Sample] = field(default_factory=list)
    val: list[Sample] = field(default_factory=list)
    orphans: list[Path] = field(default_factory=list)
    classes: Sequence[str] | None = None
    label_map: Mapping[int, int] = field(default_factory=dict)
    map_only: str = "*"
    reduce_zero_label: bool = False
    image_end: str = ""

    @property
    def samples(self) -> list[Sample]:
        """All pictures."""
        return [*self.labeled, *self.unlabeled, *self.val]


def pair(
    root: Path, images: Path, masks: Path | None, image_end: str = "", mask_ends: Sequence[str] = ("",)
) -> tuple[list[Sample], list[Path]]:
    """Pair the pictures below one folder with the masks of the same relative path, suffixes aside, below another.

    Args:
        root: the data set's root, which names are relative to.
        images: folder of the pictures.
        masks: folder of the masks; None or a missing one gives no masks.
        image_end: end of the pictures' stems that masks do not have; files without it are left out.
        mask_ends: ends of the masks' stems that pictures do not have; the first that is there counts.

    Returns:
        The samples sorted by name, and the masks without a picture.

    Raises:
        DataError: there is no folder ``images``, or two pictures could be meant by one mask.
    """
    pictures = stems(images, image_end)
    found = {end: stems(masks, end) if masks and masks.is_dir() else {} for end in mask_ends}
    samples = [
        Sample(
            path.relative_to(root).as_posix(),
            path,
            next((found[end][stem] for end in mask_ends if stem in found[end]), None),
        )
        for stem, path in pictures.items()
    ]
    # Where ends include the empty one, a mask of another end has been taken under its own stem.
    taken = {sample.mask for sample in samples}
    orphans = {path for paths in found.values() for path in paths.values() if path not in taken}
    return sorted(samples), sorted(orphans)


def stems(folder: Path, end: str = "") -> dict[str, Path]:
    """Return the pictures below a folder by their relative path without ``end`` and suffix; others are left out.

    Raises:
        DataError: there is no such folder, or two files have one stem.
    """
    if not folder.is_dir():
        raise DataError(f"no folder {folder}; {_around(folder)}")
    found: dict[str, Path] = {}
    clashes: list[str] = []
    start = len(str(folder).rstrip(os.sep)) + 1
    for path in walk(folder):
        name, suffix = os.path.splitext(path[start:])
        if suffix.lower() not in IMAGE_SUFFIXES or not name.endswith(end):
            continue
        stem = name.replace(os.sep, "/").removesuffix(end)
        if stem in found:
            clashes.append(f"{found[stem]} and {os.path.basename(path)}")
        found[stem] = Path(path)
    if clashes:
        raise DataError(
            f"{len(clashes)} names below {folder} are shared by two files, and a mask of that name could be of either; "
            f"rename or remove one of each:\n{shorten(clashes)}"
        )
    return found


def split_labeled(samples: Sequence[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Return the samples with a mask and those without."""
    return [sample for sample in samples if sample.mask], [sample for sample in samples if not sample.mask]


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
