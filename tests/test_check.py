"""The checker names each kind of damage with its file and what to do, and its figures are right."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from checking import make_set, run, save
from PIL import Image

from pseudoseg_fast import check
from pseudoseg_fast.config import parse_config
from pseudoseg_fast.data.findings import Report, report_duplicates
from pseudoseg_fast.data.lists import Sample
from pseudoseg_fast.data.scan import Scan


@pytest.fixture
def root(tmp_path):
    return make_set(tmp_path / "set")


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

    mean, std = re.search(r"--model.mean (\[.*\]) --model.std (\[.*\]);", printed).groups()
    red = np.array([0, 10, 20, 30]) / 255
    assert json.loads(mean) == pytest.approx([red.mean(), 101.5 / 255, 253.5 / 255], abs=1e-4)
    assert json.loads(std) == pytest.approx([red.std(), red.std() / 10, red.std() / 10], abs=1e-4)
    assert "which are the default, and --save leaves it at that" in printed
    values = yaml.safe_load((tmp_path / "data.yaml").read_text())
    assert values == {"data": {"root": str(root)}, "model": {"in_channels": 3}}
    config = parse_config(["--config=small", f"--config={tmp_path / 'data.yaml'}"], "", "")
    assert config.data.crop_size == 256
    assert config.model.mean is None  # ImageNet's, which the encoder was trained with


def test_a_crop_that_is_a_speck_of_the_picture_is_warned_of(root, capsys):
    for number, path in enumerate(sorted((root / "images/train").iterdir())):
        Image.new("RGB", (80, 60 + number)).save(path)
        if (mask := root / "masks/train" / path.name).exists():
            Image.new("L", (80, 60 + number)).save(mask)
    options = ["--data.crop_size=16"]
    printed = run(capsys, root, *options)[1]
    assert (
        "warning: a training crop of 16 x 16 pixels is 5.2 % of a picture of 80 x 61: give --data.short_side 32"
        in printed
    )
    for other in (["--data.crop_size=32"], [*options, "--data.short_side=40"]):
        assert "a training crop" not in run(capsys, root, *other)[1]


def test_the_layout_is_named_with_its_reason(root, capsys):
    printed = run(capsys, root)[1]
    assert "for the layout folder, since it has images and masks; --data.layout says otherwise" in printed
    assert logging.getLogger("pseudoseg_fast").handlers == []


def wrong_ids(root):
    save(root / "masks/train/1.png", [[0, 1, 2, 1, 1, 255]] * 4)


def black_and_white(root):
    for path in (root / "masks").rglob("*.png"):
        save(path, [[0, 0, 0, 255, 255, 255]] * 4)


def black_and_white_without_names(root):
    black_and_white(root)
    no_classes(root)


def many_wrong_ids(root):
    save(root / "masks/train/1.png", [range(6), range(6, 12), [255] * 6, [255] * 6])


def listed_twice(root):
    names = ["0", "1", "0"]
    tiny.write(root / "labeled.txt", [f"images/train/{name}.png masks/train/{name}.png" for name in names])


def pipe(root):
    os.mkfifo(root / "pipe")
    (root / "images/train/4.png").symlink_to(root / "pipe")


def device(root):
    (root / "images/train/4.png").symlink_to("/dev/zero")


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


def val_without_mask(root):
    shutil.copy(root / "images/val/4.png", root / "images/val/5.png")


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
        [
            "in 1 of 4 masks",
            "masks/train/1.png: 2",
            "reduce_zero_label true; if it means no label, --data.ignore_index 2",
        ],
    ),
    "many ids": (
        many_wrong_ids,
        [],
        1,
        ["9:255 and so on for the other 2;", "1.png: 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"],
    ),
    "black and white": (black_and_white, [], 1, ["--data.label_map 255:1"]),
    "black and white without names": (
        black_and_white_without_names,
        [],
        1,
        ["the ids 0, 255; 255 means ignored", "drawn in black and white", "--data.label_map 255:1"],
    ),
    "black and white, mapped, without names": (
        black_and_white_without_names,
        ["--data.label_map=255:1"],
        1,
        ["the masks hold the ids 0, 1; write their names"],
    ),
    "listed twice": (
        listed_twice,
        ["--data.labeled=labeled.txt"],
        0,
        ["warning: 1 pictures are labelled more than once", "images/train/0.png: 2 times"],
    ),
    "pipe": (pipe, [], 1, ["4.png is a folder, a pipe or a device; expected a file"]),
    "device": (device, [], 1, ["4.png is a folder, a pipe or a device; expected a file"]),
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
    "val without mask": (
        val_without_mask,
        [],
        0,
        ["warning: 1 pictures to evaluate on have no mask and are left out", "images/val/5.png"],
    ),
    "no classes": (no_classes, [], 1, ["expected the names of the classes", "masks hold the ids 0, 1, 255"]),
    "colours": (colours, [], 1, ["0.png is a colour picture (mode RGB)", "--data.color_map FILE"]),
    "absent class": (absent, [], 0, ["no labelled picture shows unicorn", "no val picture shows unicorn"]),
    "background": (
        None,
        ["--data.background=2"],
        1,
        ["error: data.background expects a class id from 0 to 1", "samples: "],
    ),
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


def test_black_and_white_masks_are_all_that_is_wrong_with_them(root, capsys):
    black_and_white(root)
    assert "warning" not in run(capsys, root)[1]


def test_a_decoder_that_fails_in_an_unforeseen_way_is_a_finding(root, monkeypatch, capsys):
    def fail(path, *_):
        raise MemoryError

    monkeypatch.setattr("pseudoseg_fast.data.scan.read_image", fail)
    status, printed = run(capsys, root)
    assert status == 1
    assert "images/train/3.png cannot be read as a picture: MemoryError()" in printed


def test_deep_and_turned_pictures_are_named(root, capsys):
    Image.fromarray(np.full((4, 6), 4095, np.uint16)).save(root / "images/train/3.png")
    exif = Image.Exif()
    exif[0x0112] = 3
    save(root / "images/train/0.png", np.zeros((4, 6, 3)), exif=exif)
    printed = run(capsys, root)[1]
    assert "1 pictures have more than 8 bits" in printed
    assert "give --data.white 4095" in printed
    assert "1 pictures are turned upright" in printed
    assert "give --data.white" not in run(capsys, root, "--data.white=4095")[1]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.5, 2, 1], "give --data.white 2, their"), ([np.nan, -1, np.nan], "give --data.white VALUE, what")],
)
def test_floating_point_numbers_need_a_white(root, capsys, values, expected):
    (root / "images/train/3.png").unlink()
    Image.fromarray(np.array([values] * 2, np.float32)).save(root / "images/train/3.tif")
    printed = run(capsys, root)[1]
    assert "1 pictures hold floating-point numbers" in printed
    assert expected in printed
    assert "high byte" not in printed


def test_a_channel_of_one_value_is_named_and_does_no_harm(root, tmp_path, capsys):
    for path in (root / "images").rglob("*.png"):
        save(path, np.full((4, 6, 3), (int(path.stem), 100 + int(path.stem), 0)))
    status, printed = run(capsys, root)
    assert status == 0
    assert "warning: channels 3 of 3 have one value in all training pictures" in printed
    assert re.search(r"--model.std \[.*, 1.0\]", printed)


def test_statistics_that_white_would_change_are_not_saved(root, tmp_path, capsys):
    for path in (root / "images").rglob("*.png"):
        Image.fromarray(np.full((4, 6), 1000 + int(path.stem), np.uint16)).save(path)
    path = tmp_path / "data.yaml"
    printed = run(capsys, root, f"--save={path}", "--model.in_channels=1")[1]
    assert "with --data.white mean and standard deviation are others: run check again with it" in printed
    assert yaml.safe_load(path.read_text())["model"] == {"in_channels": 1}
    path.unlink()
    run(capsys, root, f"--save={path}", "--model.in_channels=1", "--data.white=1010")
    assert yaml.safe_load(path.read_text())["model"]["mean"] == pytest.approx([1001.5 / 1010], abs=2e-3)
    path.unlink()
    for path_of in (root / "images").rglob("*.png"):
        Image.fromarray(np.full((4, 6), 60000 + 256 * int(path_of.stem), np.uint16)).save(path_of)
    run(capsys, root, f"--save={path}", "--model.in_channels=1")  # its high byte will do
    assert set(yaml.safe_load(path.read_text())["model"]) == {"in_channels", "mean", "std"}


def test_masks_of_nothing_are_not_black_and_white(root, capsys):
    for path in (root / "masks").rglob("*.png"):
        save(path, [[255] * 6] * 4)
    printed = run(capsys, root)[1]
    assert "label_map" not in printed
    assert "no labelled picture shows ground, wall: the network cannot learn them" in printed


def test_ids_that_may_count_from_1_are_told_of(root, capsys):
    assert "is in no mask" not in run(capsys, root)[1]
    for path in (root / "masks").rglob("*.png"):
        save(path, [[1] * 6] * 4)
    said = "0, the id of ground, is in no mask: if ids count from 1, give --data.reduce_zero_label true"
    assert said in run(capsys, root)[1]


def test_an_error_costs_no_report(root, capsys):
    status, printed = run(capsys, root, "--data.classes=none.txt")
    assert status == 1
    assert "for the layout folder, since it has images and masks; --data.layout says otherwise" in printed
    assert printed.splitlines()[-1].startswith("error: no file at")
    assert logging.getLogger("pseudoseg_fast").handlers == []


TAGS = {
    "all": (["images/train/3.png,ground"], 0, ["1 of 1 unlabelled pictures have tags"]),
    "labelled ones, too": (
        ["images/train/0.png,ground", "images/train/3.png,wall"],
        0,
        ["1 of 1 unlabelled"],
    ),
    "some of no picture": (
        ["images/train/3.png,ground", "3.png,wall"],
        0,
        [
            "warning: tags.csv: 1 of 2 lines are of pictures that are not in use",
            "such as images/train/3.png, got\n  3.png",
        ],
    ),
    "of no picture": (["3.png,wall"], 1, ["error: tags.csv tags no picture of the unlabelled ones"]),
    "of no class": (["images/train/3.png,wal"], 1, ["line 2: 'wal' is not a class; did you mean 'wall'"]),
}


@pytest.mark.parametrize(("lines", "status", "expected"), TAGS.values(), ids=TAGS)
def test_tags_are_read_as_training_does(root, capsys, lines, status, expected):
    tiny.write(root / "tags.csv", ["image,tags", *lines])
    found, printed = run(capsys, root, "--data.tags=tags.csv")
    assert found == status, printed
    assert ("warning" in printed) == ("warning" in expected[0])
    for part in expected:
        assert part in printed


def test_tags_from_hidden_masks(root, capsys):
    tiny.write(root / "labeled.txt", ["images/train/0.png masks/train/0.png"])
    status, printed = run(capsys, root, "--data.labeled=labeled.txt", "--data.tags=masks")
    assert status == 0
    assert "2 of 3 unlabelled pictures have tags" in printed


def test_a_map_given_as_a_mapping_is_saved(root, tmp_path, capsys):
    tiny.write(root.parent / "map.yaml", ["data: {label_map: {7: 1}}"])
    saved = tmp_path / "data.yaml"
    assert run(capsys, root, f"--config={root.parent / 'map.yaml'}", f"--save={saved}")[0] == 0
    assert yaml.safe_load(saved.read_text())["data"] == {"root": str(root), "label_map": {7: 1}}


def test_ids_are_named_as_training_counts_them(root, capsys):
    """Where nothing names the classes yet, and id 0 means ignored."""
    (root / "classes.txt").unlink()
    status, printed = run(capsys, root, "--data.reduce_zero_label=true")
    assert status == 1
    assert "the masks hold the ids 0, 255; write their names" in printed


def test_val_pictures_among_the_unlabelled_ones_are_left_out(root, capsys):
    status, printed = run(capsys, root, "--data.unlabeled=images")
    assert status == 0, printed
    assert "1 of 5 pictures of images are val pictures, and left out" in printed


def test_streamed_pictures_are_left_out(root, capsys):
    names = ["images/train/0.png", "images/val/4.png", *(f"0.tar/{number}.png" for number in range(9))]
    tiny.write(root / "tags.csv", ["image,tags", *(f"{name},ground" for name in names)])
    options = ["--data.unlabeled=http://127.0.0.1:9/0.tar", "--data.tags=tags.csv"]
    status, printed = run(capsys, root, *options, "--data.unlabeled_size=7")
    assert status == 0, printed
    assert "warning: pictures that are streamed are not read" in printed
    assert "tags.csv has tags of 9 pictures; which of them are streamed is not known" in printed
    status, printed = run(capsys, root, *options)
    assert status == 1
    assert "--data.unlabeled_size N" in printed


def test_names_that_are_no_utf_8_are_printed(root, capsysbinary):
    (root / "images/train/3.png").unlink()
    (root / os.fsdecode(b"images/train/\xff.png")).write_bytes(b"")
    assert check.main([f"--data.root={root}", f"--picture={root.parent / 'check.png'}"]) == 1
    assert rb"\udcff.png cannot be read as a picture" in capsysbinary.readouterr().out


def test_a_line_shows_few_of_many_copies():
    parts = {"unlabelled": [Scan(Sample(f"{n}.png", Path(f"{n}.png")), digest=b"same") for n in range(9)]}
    report = Report()
    report_duplicates(parts, report)
    (warning,) = report.warnings
    assert warning.endswith("0.png (unlabelled) = 1.png (unlabelled) = 2.png (unlabelled) and 6 more")
