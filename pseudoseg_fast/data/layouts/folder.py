"""The layout ``folder``: ``images/{train,val}`` and ``masks/{train,val}``, a picture and its mask of one stem."""

from pathlib import Path

from pseudoseg_fast.data.layouts.tree import Tree, pair, split_labeled

EXPECTED = "images/train, images/val and masks of the same names below masks/"


def recognise(root: Path) -> str | None:
    """Return why the folder looks like this layout, or None."""
    return "it has images and masks" if all((root / name).is_dir() for name in ("images", "masks")) else None


def read(root: Path) -> Tree:
    """Return the pictures; without ``images/train`` all below ``images`` are for training, and val needs a list."""
    return read_pair(root, "images", "masks")


def read_pair(root: Path, images: str, masks: str, train: str = "train", val: str = "val") -> Tree:
    """Return the pictures below ``images`` and masks below ``masks``, each with a folder for training and for val."""
    if not (root / images / train).is_dir():
        samples, orphans = pair(root, root / images, root / masks)
        inside = f"{images}/{val}/"
        held_out = [sample for sample in samples if sample.name.startswith(inside)]
        samples = [sample for sample in samples if not sample.name.startswith(inside)]
    else:
        samples, orphans = pair(root, root / images / train, root / masks / train)
        held_out = []
        if (root / images / val).is_dir():
            held_out, more = pair(root, root / images / val, root / masks / val)
            orphans += more
    labeled, unlabeled = split_labeled(samples)
    return Tree(labeled, unlabeled, split_labeled(held_out)[0], orphans)
