"""CVAT's export "Segmentation mask": VOC's folders, with classes and colours of one's own."""

import numpy as np
import pytest
import tiny
from PIL import Image

from pseudoseg_fast import check, split
from pseudoseg_fast.config import DataConfig
from pseudoseg_fast.data.labels import background_class
from pseudoseg_fast.data.lists import DataError, read_classes
from pseudoseg_fast.data.read import read_mask
from pseudoseg_fast.data.sets import read_data

COLORS = np.array([(0, 0, 0), (250, 50, 83), (51, 221, 255)], np.uint8)
LABEL_MAP = [
    "# label:color_rgb:parts:actions",
    "background:0,0,0::",
    "crack:250,50,83::",
    "rust:51,221,255::",
]


def make_export(root, lists, unmasked=(), paletted=False):
    """Pictures and masks of what ``lists`` name, the masks' ids those of ``tiny.picture``."""
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for index, name in enumerate(name for names in lists.values() for name in names):
        pixels, ids = tiny.picture(index)
        Image.fromarray(pixels).save(root / f"JPEGImages/{name}.png")
        if name in unmasked:
            continue
        mask = Image.fromarray(ids if paletted else COLORS[ids])
        if paletted:
            mask.putpalette(COLORS.tobytes())
        mask.save(root / f"SegmentationClass/{name}.png")
    for name, names in lists.items():
        tiny.write(root / f"ImageSets/Segmentation/{name}.txt", names)
    tiny.write(root / "labelmap.txt", LABEL_MAP)
    return root


@pytest.mark.parametrize("paletted", [False, True], ids=["RGB", "palette"])
def test_classes_and_colours_are_those_of_the_export(tmp_path, paletted):
    lists = {"Train": ["a", "b 1", "c"], "Validation": ["d"], "Test": ["e"]}
    data = read_data(DataConfig(str(make_export(tmp_path / "set", lists, ["c"], paletted))))
    assert (data.layout, data.classes, data.background) == ("voc", ["background", "crack", "rust"], 0)
    assert [sample.name for sample in data.labeled] == ["JPEGImages/a.png", "JPEGImages/b 1.png"]
    assert [sample.name for sample in data.unlabeled] == ["JPEGImages/c.png"]  # not the test pictures
    assert [sample.name for sample in data.val] == ["JPEGImages/d.png"]
    for index, sample in enumerate(data.labeled):
        assert np.array_equal(read_mask(sample.mask, data.labels), tiny.picture(index)[1])


def test_an_export_without_subsets_is_split(tmp_path, capsys):
    root = make_export(tmp_path / "set", {"default": list("abcdefgh")}, ["h"])
    assert split.main([f"--data.root={root}", f"--output={tmp_path / 'out'}", "--val=2"]) == 0
    printed = capsys.readouterr().out
    assert "rust" in printed
    options = printed.splitlines()[-1].split()
    lists = {
        name.removeprefix("--data."): path for name, path in zip(options[::2], options[1::2], strict=True)
    }
    data = read_data(DataConfig(str(root), **lists))
    assert [len(part) for part in (data.labeled, data.unlabeled, data.val)] == [5, 1, 2]
    picture = tmp_path / "check.png"
    assert tiny.status(check.main, [f"--data.root={root}", f"--picture={picture}", *options]) in (0, 2)


def test_undrawn_val_pictures_are_left_out(tmp_path):
    root = make_export(tmp_path / "set", {"default": ["a", "b", "c"], "Validation": ["d", "e"]}, ["c", "e"])
    data = read_data(DataConfig(str(root)))
    assert [sample.name for sample in data.unlabeled] == ["JPEGImages/c.png"]
    assert [sample.name for sample in data.val] == ["JPEGImages/d.png"]


def test_classes_of_ones_own_are_matched_by_name(tmp_path):
    root = make_export(tmp_path / "set", {"train": ["a"], "val": ["b"], "default": ["c"]})
    tiny.write(root / "classes.txt", ["rust", "background", "crack"])
    data = read_data(DataConfig(str(root)), unlabeled=False)
    assert np.array_equal(read_mask(data.val[0].mask, data.labels), np.array([1, 2, 0])[tiny.picture(1)[1]])
    tiny.write(root / "classes.txt", ["rust", "background"])
    with pytest.raises(DataError, match=r"and data\.classes lacks crack: name all of them"):
        read_data(DataConfig(str(root)))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("crack", "expected name:r,g,b:parts:actions, got 'crack'"),
        ("crack:1,2::", "expected name:r,g,b:parts:actions"),
        ("crack:1,2,300::", "colours are 0 to 255"),
        ("crack:0,0,0::", "class or colour comes twice"),
        (None, "is empty"),
    ],
)
def test_a_label_map_that_is_none(tmp_path, line, expected):
    root = make_export(tmp_path / "set", {"default": ["a"]})
    tiny.write(root / "labelmap.txt", ["# nothing"] if line is None else ["background:0,0,0::", line])
    with pytest.raises(DataError, match=expected):
        read_data(DataConfig(str(root)))


def test_an_export_without_pictures(tmp_path):
    root = make_export(tmp_path / "set", {"default": ["a"]})
    (root / "JPEGImages/a.png").unlink()
    (root / "JPEGImages").rmdir()
    with pytest.raises(DataError, match=r"export with the pictures \(Save images\)"):
        read_data(DataConfig(str(root)))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["0: sky", "1: road"], "numbers its classes, '0: sky' first; expected names alone"),
        (["0. sky", "1. road"], "names alone, one a line in the order of the mask ids from 0$"),
        (["1,sky", "2,road"], "where ids in the masks count from 1 and 0 means no label, give --data.reduce"),
    ],
)
def test_numbered_classes_are_refused(tmp_path, lines, expected):
    tiny.write(tmp_path / "classes.txt", lines)
    with pytest.raises(DataError, match=expected):
        read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize(
    "lines",
    [
        ["1 way", "road"],
        ["1 person", "2 persons"],
        ["0.5 m", "1.5 m"],
        ["3 lanes", "4 lanes"],
        ["0"],
        ["2d", "3d"],
    ],
)
def test_names_may_begin_with_numbers(tmp_path, lines):
    tiny.write(tmp_path / "classes.txt", lines)
    assert read_classes(tmp_path / "classes.txt") == lines


@pytest.mark.parametrize("name", ["background", "_background_", "__background__", "BG", "Background"])
def test_names_of_the_background(name):
    assert background_class("auto", ["road", name]) == 1
    assert background_class("auto", ["road", f"{name}s"]) is None
