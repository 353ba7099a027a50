"""Masks drawn from the outlines of YOLO's label files."""

import pytest
from PIL import Image

from pseudoseg_fast.config import DataConfig
from pseudoseg_fast.data.layouts import guess, yolo
from pseudoseg_fast.data.lists import DataError
from pseudoseg_fast.data.read import read_mask
from pseudoseg_fast.data.sets import read_data

CUP_ON_TABLE = (
    "1 0.125 0.1666667 0.375 0.1666667 0.375 0.5 0.125 0.5\n0 0 0 0.75 0 0.75 0.6666667 0 0.6666667\n"
)
DRAWN = [
    [1, 1, 1, 1, 1, 1, 0, 0],
    [1, 2, 2, 1, 1, 1, 0, 0],
    [1, 2, 2, 1, 1, 1, 0, 0],
    [1, 1, 1, 1, 1, 1, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0],
]


pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # pycocotools's own


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path / "cache"))


def write(root, split, name, text=None, roboflow=False):
    """Write a picture of 8 x 6 pixels and, with a text, its label file."""
    images, labels = (
        root / (f"{split}/{kind}" if roboflow else f"{kind}/{split}") for kind in ("images", "labels")
    )
    for folder in (images, labels):
        folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6)).save(images / f"{name}.jpg")
    if text is not None:
        (labels / f"{name}.txt").write_text(text)


def names(root, text="names: [table, cup]\n"):
    (root / "data.yaml").write_text(f"train: ../train/images\nval: ../valid/images\n{text}")


def read(root, **options):
    return read_data(DataConfig(root=str(root), **options))


@pytest.mark.parametrize("roboflow", [False, True])
def test_outlines_are_drawn(tmp_path, roboflow):
    root = tmp_path / "set"
    write(root, "train", "a b", CUP_ON_TABLE, roboflow)
    write(root, "train", "nothing there", "", roboflow)
    write(root, "train", "nobody looked", None, roboflow)
    write(root, "valid" if roboflow else "val", "c", CUP_ON_TABLE, roboflow)
    names(root, "names:\n  0: table\n  1: cup\n" if roboflow else "names: [table, cup]\n")
    folder = "train/labels" if roboflow else "labels/train"
    assert guess(root, lists=False) == ("yolo", f"it has data.yaml and {folder}")
    data = read(root)
    assert data.classes == ["background", "table", "cup"]
    drawn, empty = (read_mask(sample.mask, data.labels) for sample in data.labeled)
    assert drawn.tolist() == DRAWN
    assert not empty.any()
    assert [name.split("/")[-1] for name in data.unlabeled.names] == ["nobody looked.jpg"]


def test_a_change_is_seen(tmp_path):
    root = tmp_path / "set"
    write(root, "train", "a", "0 0 0 1 0 1 1 0 1")
    write(root, "train", "b")
    write(root, "val", "c", CUP_ON_TABLE)
    names(root)
    assert read_mask(read(root).labeled[0].mask, read(root).labels).max() == 1
    write(root, "train", "a", "1 0 0 1 0 1 1 0 1\n\n")
    assert read_mask(read(root).labeled[0].mask, read(root).labels).max() == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 0.5 0.5 0.2 0.2", "a.txt: line 1 is a box, and no outline: export instance segmentation"),
        ("\n0 0.5 0.5 0.2 0.2 0.1", "a.txt: line 2 has 5 numbers behind the class"),
        ("2 0 0 1 0 1 1", "a.txt: line 1 is of class 2; the YAML file names 0 to 1"),
        ("0 0 0 80 0 80 60", "line 1 has x and y from 0 to 80; expected shares from 0 to 1"),
        ("0 0 0 1 0 1 nan", "expected shares from 0 to 1"),
        ("cup 0 0 1 0 1 1", "line 1 expects a class and x and y of points, got 'cup 0 0 1 0 1 1'"),
    ],
)
def test_wrong_lines(tmp_path, text, message):
    root = tmp_path / "set"
    write(root, "train", "a", text)
    write(root, "val", "c", CUP_ON_TABLE)
    names(root)
    with pytest.raises(DataError, match="1 annotation files cannot be drawn") as caught:
        read(root)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: []\n", "expects a name for each number"),
        ("names: {0: cup, 2: table}\n", "expects a name for each number"),
        ("names: [cup, cup]\n", "has a name twice"),
        ("names: [background, cup]\n", "calls one background"),
    ],
)
def test_wrong_names(tmp_path, text, message):
    root = tmp_path / "set"
    write(root, "train", "a", CUP_ON_TABLE)
    names(root, text)
    with pytest.raises(DataError, match=message):
        read(root)


def test_without_names_it_is_no_such_layout(tmp_path):
    root = tmp_path / "set"
    write(root, "train", "a", CUP_ON_TABLE)
    assert yolo.recognise(root) is None
    names(root)
    assert yolo.recognise(root)
    (root / "masks").mkdir()
    assert yolo.recognise(root) is None
