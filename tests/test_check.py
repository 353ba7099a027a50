"""The checker names each kind of damage with its file and what to do, and its figures are right."""

import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from pseudoseg_fast import check
from pseudoseg_fast.config import parse_config


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


@pytest.fixture
def root(tmp_path):
    """Three labelled, one unlabelled and one val picture, 6 x 4, all of them different."""
    root = tmp_path / "set"
    for number, part in enumerate(("train", "train", "train", "train", "val")):
        save(root / f"images/{part}/{number}.png", np.full((4, 6, 3), (10 * number, 100, 255)))
        if number != 3:
            save(root / f"masks/{part}/{number}.png", [[0, 0, 0, 1, 1, 255]] * 4)
    (root / "classes.txt").write_text("ground\nwall\n")
    return root


def run(capsys, root, *arguments):
    status = check.main([f"--data.root={root}", f"--picture={root.parent / 'check.png'}", *arguments])
    return status, capsys.readouterr().out


def test_a_sound_set(root, tmp_path, capsys):
    status, printed = run(capsys, root, f"--save={tmp_path / 'data.yaml'}")
    assert status == 0
    assert "error" not in printed
    assert "warning" not in printed
    assert "labelled: 3 pictures, 6 x 4 to 6 x 4 pixels, 3 RGB" in printed
    table = {line.split()[0]: line.split()[1:] for line in printed.splitlines()}
    assert table["ground"] == ["50.00", "3", "50.00", "1"]
    assert table["wall"] == ["33.33", "3", "33.33", "1"]
    assert table["(ignored)"] == ["16.67", "3", "16.67", "1"]
    with Image.open(tmp_path / "check.png") as picture:
        assert picture.width > 3 * 192

    values = yaml.safe_load((tmp_path / "data.yaml").read_text())
    assert values["data"] == {"root": str(root)}
    red = np.array([0, 10, 20, 30]) / 255
    assert values["model"]["mean"] == pytest.approx([red.mean(), 100 / 255, 1], abs=1e-4)
    assert values["model"]["std"] == pytest.approx([red.std(), 0, 0], abs=1e-4)
    config = parse_config(["--config=small", f"--config={tmp_path / 'data.yaml'}"], "", "")
    assert config.data.crop_size == 256
    assert config.model.mean == tuple(values["model"]["mean"])
    with pytest.raises(SystemExit):
        run(capsys, root, f"--save={tmp_path / 'data.yaml'}")
    assert "is there already" in capsys.readouterr().err


def wrong_ids(root):
    save(root / "masks/train/1.png", [[0, 1, 2, 1, 1, 255]] * 4)


def black_and_white(root):
    for path in (root / "masks").rglob("*.png"):
        save(path, [[0, 0, 0, 255, 255, 255]] * 4)


def broken_picture(root):
    (root / "images/train/3.png").write_bytes(b"")


def text_for_a_picture(root):
    (root / "images/train/3.png").write_text("hello")


def broken_mask(root):
    path = root / "masks/train/0.png"
    path.write_bytes(path.read_bytes()[:-30])


def other_size(root):
    save(root / "masks/val/4.png", [[0, 1]])


def leak(root):
    shutil.copy(root / "images/val/4.png", root / "images/train/again ü.png")


def copy(root):
    shutil.copy(root / "images/train/0.png", root / "images/train/again.png")


def orphan(root):
    shutil.copy(root / "masks/train/0.png", root / "masks/train/lonely.png")


def no_classes(root):
    (root / "classes.txt").unlink()


def colours(root):
    save(root / "masks/train/0.png", np.zeros((4, 6, 3)))


def absent(root):
    (root / "classes.txt").write_text("ground\nwall\nunicorn\n")


FINDINGS = {
    "ids": (
        wrong_ids,
        [],
        1,
        ["in 1 of 4 masks", "masks/train/1.png: 2", "--data.ignore_index 2", "reduce_zero_label"],
    ),
    "black and white": (black_and_white, [], 1, ["--data.label_map 255:1"]),
    "black and white, mapped": (black_and_white, ["--data.label_map=255:1"], 0, ["layout folder"]),
    "broken picture": (
        broken_picture,
        [],
        1,
        ["1 pictures cannot be used", "images/train/3.png cannot be read"],
    ),
    "text": (text_for_a_picture, [], 1, ["images/train/3.png cannot be read as a picture"]),
    "broken mask": (
        broken_mask,
        [],
        1,
        ["1 masks cannot be used", "masks/train/0.png cannot be read as a mask"],
    ),
    "size": (other_size, [], 1, ["masks/val/4.png has 2 x 1 pixels", "expected the same size"]),
    "leak": (
        leak,
        [],
        1,
        ["1 val pictures are trained on", "again ü.png (unlabelled) = ", "val/4.png (val)"],
    ),
    "copy": (copy, [], 0, ["warning: 1 pictures are there more than once", "0.png (labelled)"]),
    "orphan": (orphan, [], 0, ["warning: 1 masks have no picture", "lonely.png"]),
    "no classes": (no_classes, [], 1, ["expected the names of the classes", "masks hold the ids 0, 1, 255"]),
    "colours": (colours, [], 1, ["0.png is a colour picture (mode RGB)", "--data.color_map FILE"]),
    "absent class": (absent, [], 0, ["no labelled picture shows unicorn", "no val picture shows unicorn"]),
    "wrong list": (None, ["--data.val=none.txt"], 1, ["no file at"]),
    "channels": (None, ["--model.in_channels=5"], 1, ["0.png has 3 channels, expected 5"]),
    "no layout": (lambda root: (root / "images").rename(root / "x"), [], 1, ["none of the layouts"]),
    "no root": (shutil.rmtree, [], 1, ["data.root expects a folder"]),
}


@pytest.mark.parametrize(("damage", "arguments", "status", "expected"), FINDINGS.values(), ids=FINDINGS)
def test_findings(root, capsys, damage, arguments, status, expected):
    if damage:
        damage(root)
    found, printed = run(capsys, root, *arguments)
    assert found == status, printed
    for part in expected:
        assert part in printed


def test_pictures_with_masks_in_both_training_lists_are_read_once(root, capsys):
    (root / "all.txt").write_text("".join(f"images/train/{number}.png\n" for number in range(4)))
    _, once = run(capsys, root)
    status, printed = run(capsys, root, "--data.unlabeled=all.txt")
    assert status == 0
    assert "unlabelled: 4 pictures" in printed
    assert "more than once" not in printed
    assert printed.splitlines()[-1] == once.splitlines()[-1]  # mean and std


def test_deep_and_turned_pictures_are_named(root, capsys):
    Image.fromarray(np.full((4, 6), 4095, np.uint16)).save(root / "images/train/3.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    save(root / "images/train/0.png", np.zeros((4, 6, 3)), exif=exif)
    printed = run(capsys, root)[1]
    assert "give --data.white 4095" in printed
    assert "1 pictures are turned upright" in printed
