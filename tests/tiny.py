"""A data set of eight small pictures, and the command line that trains a network of a few layers on it."""

import csv

import numpy as np
import torch
from PIL import Image

HEIGHT, WIDTH = 40, 48
CLASSES = ("background", "disc", "square")
COLORS = np.array([(40, 40, 40), (220, 40, 40), (40, 220, 40)])
ENCODER = "test_efficientnet"


def picture(index):
    """A red disc on the left and a green square on the right, on noisy grey: pixels [H, W, 3] and ids [H, W]."""
    random = np.random.default_rng(index)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    row, column = random.integers(9, HEIGHT - 9), random.integers(9, 15)
    ids[(rows - row) ** 2 + (columns - column) ** 2 < 70] = 1
    row, column = random.integers(0, HEIGHT - 15), random.integers(24, WIDTH - 15)
    ids[row : row + 15, column : column + 15] = 2
    noise = random.integers(-20, 21, (HEIGHT, WIDTH, 1))
    return (COLORS[ids] + noise).clip(0, 255).astype(np.uint8), ids


def make_set(root):
    """Write pictures, masks and lists; pictures 1 to 3 are unlabelled and have no mask file."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for index in range(8):
        pixels, ids = picture(index)
        Image.fromarray(pixels).save(root / f"images/{index}.png")
        if index not in (1, 2, 3):
            Image.fromarray(ids).save(root / f"masks/{index}.png")
    write(root / "labeled.txt", ["images/0.png masks/0.png", "images/4.png masks/4.png"])
    write(root / "unlabeled.txt", [f"images/{index}.png" for index in (0, 1, 2, 3)])
    write(root / "val.txt", [f"images/{index}.png masks/{index}.png" for index in (5, 6, 7)])
    write(root / "classes.txt", CLASSES)
    return root


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))


def options(root, folder, changes=None):
    """The command line of a run of 3 steps in ``folder``; ``changes`` adds options, and None takes one away."""
    values = {
        "data.root": root,
        "data.labeled": "labeled.txt",
        "data.unlabeled": "unlabeled.txt",
        "data.val": "val.txt",
        "data.classes": "classes.txt",
        "data.crop_size": 32,
        "data.scales": [1.0],
        "data.workers": 0,
        "model.encoder_name": ENCODER,
        "model.encoder_weights": "null",
        "model.attention_dim": 8,
        "optim.steps": 3,
        "optim.batch_size": 2,
        "run.dir": folder,
        "run.accelerator": "cpu",
        "run.draw_every": 0,
    } | (changes or {})
    return [f"--{name}={value}" for name, value in values.items() if value is not None]


def status(main, arguments):
    """The exit status of a command, however it ends."""
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code


def checkpoint(folder, name="last"):
    """The state in one of a run's checkpoints."""
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def log(folder):
    """The rows of a run's CSV log, without empty columns, as numbers; names without ``train/`` and ``eval/``."""
    with (folder / "log" / "metrics.csv").open(newline="") as file:
        return [
            {
                name.removeprefix("train/").removeprefix("eval/"): float(value)
                for name, value in row.items()
                if value
            }
            for row in csv.DictReader(file)
        ]
