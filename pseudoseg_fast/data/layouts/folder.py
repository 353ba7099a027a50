"""The layout ``folder``: ``images/{train,val}`` and ``masks/{train,val}``, a picture and its mask of one stem."""

from pathlib import Path

from pseudoseg_fast.data.layouts.tree import Pairs, Tree, pair
from pseudoseg_fast.data.samples import Names, Samples

EXPECTED = "images/train, images/val and masks of the same names below masks/"


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    return "it has images and masks" if all((root / name).is_dir() for name in ("images", "masks")) else None


def read(root: Path) -> Tree:
    """Return the pictures; without ``images/train`` all below ``images`` are for training, and val needs a list."""
    return read_pair(root, "images", "masks")


def read_pair(root: Path, images: str, masks: str, train: str = "train", val: str = "val") -> Tree:
    """Return the pictures below ``images`` and masks below ``masks``, each with a folder for training and for val."""
    if (root / images / train).is_dir():
        known = pair(root, root / images / train, root / masks / train)
        held_out = Pairs()
        if (root / images / val).is_dir():
            held_out = pair(root, root / images / val, root / masks / val)
        orphans = [*known.orphans, *held_out.orphans]
        return Tree(known.labeled, known.unlabeled, held_out.labeled, orphans, held_out.unlabeled)
    every = pair(root, root / images, root / masks)
    inside = f"{images}/{val}/"
    names = every.unlabeled.names
    return Tree(
        [sample for sample in every.labeled if not sample.name.startswith(inside)],
        Samples(root, Names.of(name for name in names if not name.startswith(inside))),
        [sample for sample in every.labeled if sample.name.startswith(inside)],
        every.orphans,
        Samples(root, Names.of(name for name in names if name.startswith(inside))),
    )
