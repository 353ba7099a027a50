"""Training on pictures that are neither colour nor grey, from the first layer to the drawing of samples."""

import numpy as np
import tiny
from PIL import Image

from pseudoseg_fast import evaluate, train


def test_four_channels(tmp_path):
    root = tiny.make_set(tmp_path / "pictures")
    for path in (root / "images").iterdir():
        pixels = np.array(Image.open(path))
        Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(path)
    changes = {"model.in_channels": 4, "model.mean": [0.4] * 4, "model.std": [0.2] * 4, "optim.steps": 2}
    assert train.main(tiny.options(root, tmp_path / "run", changes)) == 0
    assert all(np.isfinite(value) for row in tiny.log(tmp_path / "run") for value in row.values())
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert tiny.checkpoint(tmp_path / "run")["model"]["mean"].shape == (4,)
    assert evaluate.main([f"--checkpoint={path}", "--accelerator=cpu", "--data.workers=0"]) == 0
