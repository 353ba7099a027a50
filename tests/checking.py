"""A data set of five small pictures for the tests of ``check``, and its command line."""

import numpy as np
from PIL import Image

from pseudoseg_fast import check


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


def make_set(root):
    """Three labelled, one unlabelled and one val picture, 6 x 4, all of them different."""
    for number, part in enumerate(("train", "train", "train", "train", "val")):
        save(
            root / f"images/{part}/{number}.png",
            np.full((4, 6, 3), (10 * number, 100 + number, 255 - number)),
        )
        if number != 3:
            save(root / f"masks/{part}/{number}.png", [[0, 0, 0, 1, 1, 255]] * 4)
    (root / "classes.txt").write_text("ground\nwall\n")
    return root


def run(capsys, root, *arguments):
    """The exit status of a check of ``root``, and what it prints."""
    status = check.main([f"--data.root={root}", f"--picture={root.parent / 'check.png'}", *arguments])
    return status, capsys.readouterr().out
