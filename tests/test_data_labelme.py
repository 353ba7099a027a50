"""Masks drawn from LabelMe's files."""

import base64
import io
import json
import logging

import numpy as np
import pytest
from PIL import Image

from pseudoseg_fast.config import DataConfig
from pseudoseg_fast.data.layouts import guess, labelme
from pseudoseg_fast.data.lists import DataError
from pseudoseg_fast.data.read import read_mask
from pseudoseg_fast.data.sets import read_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path / "cache"))


def shape(label, points, kind="polygon", **others):
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **others}


def bitmap(pixels):
    file = io.BytesIO()
    Image.fromarray(np.array(pixels, bool)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


SHAPES = [
    shape("table", [[0, 0], [5, 0], [5, 3], [0, 3]]),
    shape("cup", [[2, 2], [1, 1]], "rectangle"),  # on the table, since it comes later
    shape("__ignore__", [[6, 0], [7, 0], [7, 5], [6, 5]]),
    shape("cup", [[3, 4], [4, 5]], "mask", mask=bitmap([[0, 1], [1, 1]])),
]
DRAWN = [
    [2, 2, 2, 2, 2, 2, 255, 255],
    [2, 1, 1, 2, 2, 2, 255, 255],
    [2, 1, 1, 2, 2, 2, 255, 255],
    [2, 2, 2, 2, 2, 2, 255, 255],
    [0, 0, 0, 0, 1, 0, 255, 255],
    [0, 0, 0, 1, 1, 0, 255, 255],
]


def write(folder, name, shapes=None, size=(8, 6), told=None):
    """Write a picture and, with shapes, LabelMe's file beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(folder / f"{name}.jpg")
    if shapes is not None:
        width, height = told or size
        content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"{name}.jpg"}
        content |= {"imageData": None, "imageHeight": height, "imageWidth": width}
        (folder / f"{name}.json").write_text(json.dumps(content))


def read(root, **options):
    return read_data(DataConfig(root=str(root), **options))


def mask_of(data, sample):
    return read_mask(sample.mask, data.labels).tolist()


def test_pictures_of_train_and_val(tmp_path):
    root = tmp_path / "set"
    write(root / "train", "a b.c", SHAPES)
    write(root / "train" / "more", "late", [shape("cup", [[0, 0], [1, 1]], "circle")])
    write(root / "train", "nobody looked at this", [])
    write(root / "train", "nor at this")
    write(root / "val", "d", [shape("table", [[0, 0], [7, 0], [7, 5], [0, 5]])])
    layout, why = guess(root, lists=False)
    assert (layout, why) == ("labelme", "it has LabelMe's train/a b.c.json")
    data = read(root)
    assert data.classes == ["background", "cup", "table"]
    assert data.background == 0
    assert [sample.name for sample in data.labeled] == ["train/a b.c.jpg", "train/more/late.jpg"]
    assert [sample.name for sample in data.unlabeled] == [
        "train/nobody looked at this.jpg",
        "train/nor at this.jpg",
    ]
    assert mask_of(data, data.labeled[0]) == DRAWN
    assert mask_of(data, data.val[0]) == [[2] * 8] * 6


@pytest.mark.parametrize("folder", [".", "images"])
def test_pictures_of_one_folder(tmp_path, folder):
    root = tmp_path / "set"
    for name in "abc":
        write(root / folder, name, SHAPES)
    write(root / folder, "d")
    name = "a.jpg" if folder == "." else "images/a.jpg"
    (root / "val.txt").write_text(f"{name}\n")
    (root / "labeled.txt").write_text(name.replace("a.jpg", "b.jpg"))
    (root / "unlabeled.txt").write_text(name.replace("a.jpg", "d.jpg"))
    data = read(root, val="val.txt", labeled="labeled.txt", unlabeled="unlabeled.txt")
    assert mask_of(data, data.labeled[0]) == DRAWN
    data = read(root, val="val.txt")
    assert len(data.labeled) == 2
    assert mask_of(data, data.val[0]) == DRAWN


def test_masks_beside_the_files_are_of_the_layout_folder(tmp_path):
    root = tmp_path / "set"
    write(root / "images", "a", SHAPES)
    (root / "masks").mkdir()
    assert guess(root, lists=False)[0] == "folder"


def test_a_change_is_seen(tmp_path):
    root = tmp_path / "set"
    write(root / "train", "a", SHAPES)
    write(root / "train", "b")
    write(root / "val", "d", SHAPES)
    assert read(root).classes == ["background", "cup", "table"]
    write(root / "train", "b", [shape("bowl", [[0, 0], [7, 0], [7, 5]])])
    write(root / "train", "e")
    assert read(root).classes == ["background", "bowl", "cup", "table"]


def test_a_list_of_classes_decides_of_their_order(tmp_path):
    root = tmp_path / "set"
    for part in ("train", "val"):
        write(root / part, "a", [*SHAPES, shape("_background_", [[0, 0], [1, 0], [1, 1], [0, 1]])])
    write(root / "train", "b")
    (root / "labels.txt").write_text("__ignore__\n_background_\ntable\nbowl\ncup\n")
    data = read(root)
    assert data.classes == ["_background_", "table", "bowl", "cup"]
    ids = np.array(mask_of(data, data.val[0]))
    assert ids[:, 0].tolist() == [0, 0, 1, 1, 0, 0]
    assert ids[2, 2] == 3
    (root / "classes.txt").write_text("table\ncup\nbowl\n")  # without a background the rest is ignored
    with pytest.raises(
        DataError, match=r"1 labels are not among the classes of .*\n.*'_background_', first in"
    ):
        read(root)
    for part in ("train", "val"):
        write(root / part, "a", SHAPES)
    data = read(root)
    assert data.background is None
    assert mask_of(data, data.val[0])[4] == [255, 255, 255, 255, 1, 255, 255, 255]


def test_classes_of_another_file_are_found_by_name(tmp_path):
    root = tmp_path / "set"
    for part in ("train", "val"):
        write(root / part, "a", SHAPES)
    write(root / "train", "b")
    (root / "mine.txt").write_text("table\nspoon\ncup\nbackground\n")
    data = read(root, classes="mine.txt")
    assert mask_of(data, data.val[0])[1] == [0, 2, 2, 0, 0, 0, 255, 255]
    (root / "mine.txt").write_text("nothing\nmug\ndesk\n")  # as many: new names
    assert mask_of(read(root, classes="mine.txt"), data.val[0]) == DRAWN
    (root / "mine.txt").write_text("background\ntable\nmug\n")  # is the table at its place a mug, or a cup?
    with pytest.raises(DataError, match="the 3 given ones lack cup"):
        read(root, classes="mine.txt")
    (root / "mine.txt").write_text("background\ncup\n")
    with pytest.raises(DataError, match="the 2 given ones lack table"):
        read(root, classes="mine.txt")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (shape("cup", [[0, 0], [1, 1]], "line"), "shape 2, 'cup', is a line, which covers no pixels"),
        (shape("cup", [[0, 0], [1, 1]]), "shape 2, 'cup', has 2 points; a polygon has 3"),
        (
            shape("cup", [[0, 0], [1, 1]], "mask", mask="?"),
            "shape 2, 'cup', has a bitmap that cannot be read",
        ),
        ({"points": []}, "a.json: KeyError: 'label'"),
        (shape("cup", [[0, 0], [1], [2, 2]]), "a.json: ValueError"),
    ],
    ids=["line", "two points", "bitmap", "no label", "half a point"],
)
def test_wrong_shapes(tmp_path, wrong, message):
    root = tmp_path / "set"
    write(root / "train", "a", [SHAPES[0], wrong])
    write(root / "val", "d", SHAPES)
    with pytest.raises(DataError) as caught:
        read(root)
    assert message in str(caught.value)
    assert str(caught.value).count("a.json") == 1


def test_a_picture_of_another_size(tmp_path):
    root = tmp_path / "set"
    write(root / "train", "a", SHAPES, told=(9, 6))
    write(root / "val", "d", SHAPES)
    with pytest.raises(DataError, match="drawn on 9 x 6 pixels, and its picture has 8 x 6"):
        read(root)


def test_other_json_files_are_left_alone(tmp_path, caplog):
    root = tmp_path / "set"
    for part in ("train", "val"):
        write(root / part, "a", SHAPES)
    write(root / "train", "b")
    (root / "train" / "b.json").write_text('{"exposure": 3}')
    (root / "train" / "index.json").write_text("{")
    with caplog.at_level(logging.INFO):
        data = read(root)
    assert len(data.labeled) == 1
    assert len(data.unlabeled) == 1


def test_labels_that_are_none(tmp_path):
    root = tmp_path / "set"
    for part in ("train", "val"):
        write(root / part, "a", [shape("__ignore__", [[0, 0], [7, 0], [7, 5]])])
    with pytest.raises(DataError, match="name 0 labels beside the background"):
        labelme.masks(root)
