"""The predict command on the tiny pictures, and what it leaves."""

import numpy as np
import tiny
from PIL import Image

from pseudoseg_fast import predict


def run(*arguments):
    return tiny.status(predict.main, [*map(str, arguments), "--threads", "1", "--device", "cpu"])


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def read(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        assert image.getpalette("RGB")[:9] == tiny.COLORS.ravel().tolist()
        return np.array(image)
