"""Masks drawn from COCO's annotation files."""

import json
import logging
import sys

import numpy as np
import pytest
from PIL import Image

from pseudoseg_fast.config import DataConfig
from pseudoseg_fast.data.layouts import coco, coco_json
from pseudoseg_fast.data.layouts.tree import class_names
from pseudoseg_fast.data.lists import DataError
from pseudoseg_fast.data.read import read_mask
from pseudoseg_fast.data.sets import read_data
from pseudoseg_fast.split import split as choose

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # pycocotools's own

CATEGORIES = [{"id": 47, "name": "cup"}, {"id": 7, "name": "table"}, {"id": 90, "name": "crowd of cups"}]
CUP, TABLE, CROWD = 2, 1, 3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path / "cache"))


def box(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def annotation(number, category, segmentation, image=1, **others):
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "segmentation": segmentation,
        "iscrowd": 0,
        **others,
    }


def arrange(root, annotations, split="train2017", categories=CATEGORIES, kind="instances", **others):
    """Write two pictures of 8 x 6 pixels and an annotation file that knows the first."""
    for name in ("a b.jpg", "unknown.jpg"):
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(path)
    images = [{"id": 1, "file_name": "a b.jpg", "height": 6, "width": 8}]
    path = root / "annotations" / f"{kind}_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories, **others})
    )


SHAPES = [
    annotation(1, 47, box(1, 1, 2, 2)),
    annotation(2, 7, box(0, 0, 6, 4)),  # drawn before the cup that stands on it, though it comes later
    annotation(
        3, 47, {"size": [6, 8], "counts": [24, 12, 12]}, iscrowd=1
    ),  # columns 4 and 5, under the table
    annotation(4, 90, {"size": [6, 8], "counts": "T1<"}),  # columns 6 and 7
]
DRAWN = [
    [1, 1, 1, 1, 1, 1, 3, 3],
    [1, 2, 2, 1, 1, 1, 3, 3],
    [1, 2, 2, 1, 1, 1, 3, 3],
    [1, 1, 1, 1, 1, 1, 3, 3],
    [0, 0, 0, 0, 2, 2, 3, 3],
    [0, 0, 0, 0, 2, 2, 3, 3],
]


def test_instances_are_drawn_once(tmp_path, monkeypatch):
    for split in ("train2017", "val2017"):
        arrange(tmp_path, SHAPES, split)
    data = read_data(DataConfig(str(tmp_path)))
    assert data.layout == "coco"
    assert data.classes == ["background", "table", "cup", "crowd of cups"]
    assert data.background == 0
    assert [sample.name for sample in data.labeled] == ["train2017/a b.jpg"]
    assert [sample.name for sample in data.unlabeled] == ["train2017/unknown.jpg"]
    assert [sample.name for sample in data.val] == ["val2017/a b.jpg"]
    assert read_mask(data.labeled[0].mask, data.labels).tolist() == DRAWN
    monkeypatch.setattr(coco_json, "_save", None)
    assert read_data(DataConfig(str(tmp_path))).labeled == data.labeled
    arrange(tmp_path, SHAPES[:1] * 2)
    with pytest.raises(TypeError):  # another file: drawn anew
        read_data(DataConfig(str(tmp_path)))
    assert not [path for path in (tmp_path / "cache" / "data").iterdir() if path.name.startswith(".")]


def test_parts_of_fewer_than_three_points_cover_nothing(tmp_path):
    arrange(tmp_path, [annotation(1, 47, [[5, 5, 7, 5], *box(1, 1, 2, 2), [4, 4], []])])
    for path in (tmp_path / "annotations").iterdir():
        masks = coco_json.instance_masks(path, tmp_path / "train2017")
        with Image.open(masks.folder / "a b.png") as mask:
            assert np.count_nonzero(np.asarray(mask) == CUP) == np.count_nonzero(mask) == 4


def test_many_masks_are_drawn_by_many_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_json, "_ALONE", 1)
    for split in ("train2017", "val2017"):
        arrange(tmp_path, SHAPES[:2], split)
    data = read_data(DataConfig(str(tmp_path)))
    assert data.pixels == [24, 20, 4, 0]


def test_folders_without_a_year_are_anybodys(tmp_path):
    for split in ("train", "val"):
        arrange(tmp_path, SHAPES[:2], split, [{"id": 0, "name": "Background"}, *CATEGORIES])
    data = read_data(DataConfig(str(tmp_path)))
    assert (data.layout, data.classes[0], data.pixels[:3]) == ("coco", "background", [24, 20, 4])


def test_an_export_of_roboflow(tmp_path):
    """Its annotations lie beside the pictures, and its first category stands above the others and has none."""
    root = {"id": 0, "name": "kitchens", "supercategory": "none"}
    categories = [root, *({**category, "supercategory": "kitchens"} for category in CATEGORIES)]
    for split in ("train", "valid", "test"):
        arrange(tmp_path, SHAPES, split, categories)
        annotations = tmp_path / "annotations" / f"instances_{split}.json"
        annotations.rename(tmp_path / split / "_annotations.coco.json")
    (tmp_path / "annotations").rmdir()
    data = read_data(DataConfig(str(tmp_path)))
    assert (data.layout, data.classes) == ("coco", ["background", "table", "cup", "crowd of cups"])
    assert [sample.name for sample in data.labeled] == ["train/a b.jpg"]
    assert [sample.name for sample in data.unlabeled] == ["train/unknown.jpg"]
    assert [sample.name for sample in data.val] == ["valid/a b.jpg"]
    assert read_mask(data.val[0].mask, data.labels).tolist() == DRAWN


@pytest.mark.parametrize(
    "above",
    [
        {"id": 90, "name": "kitchens", "supercategory": "none"},  # annotated: a class
        {"id": 0, "name": "kitchens", "supercategory": "houses"},
        {"id": 0, "name": "unused", "supercategory": "none"},
    ],
)
def test_categories_above_others_may_be_classes(tmp_path, above):
    others = [category for category in CATEGORIES if category["id"] != above["id"]]
    arrange(tmp_path, SHAPES, "train", [above, *({**other, "supercategory": "kitchens"} for other in others)])
    assert above["name"] in coco.read(tmp_path).classes


def test_masks_beside_annotations_are_of_the_layout_folder(tmp_path):
    """As annotation tools export both; COCO's names are not theirs."""
    for split in ("train", "val"):
        arrange(tmp_path, SHAPES[:2], split)
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / split).rename(tmp_path / "images" / split)
        (tmp_path / "masks" / split).mkdir(parents=True)
        Image.new("L", (8, 6), 1).save(tmp_path / "masks" / split / "a b.png")
    (tmp_path / "classes.txt").write_text("ground\nwall\n")
    data = read_data(DataConfig(str(tmp_path)))
    assert (data.layout, data.classes, data.pixels) == ("folder", ["ground", "wall"], [0, 48])
    for split in ("train", "val"):
        (tmp_path / "masks" / split / "a b.png").replace(tmp_path / "masks" / "a b.png")
        (tmp_path / "masks" / split).rmdir()
    assert read_data(DataConfig(str(tmp_path), layout="coco")).classes == ["ground", "wall"]
    (tmp_path / "classes.txt").unlink()
    with pytest.raises(DataError, match="expected the names of the classes"):
        read_data(DataConfig(str(tmp_path), layout="coco"))


def test_panoptic_masks(tmp_path):
    categories = [{**category, "isthing": 1} for category in CATEGORIES]
    categories.append({"id": 200, "name": "rug", "isthing": 0})
    infos = [{"id": 300, "category_id": 47, "iscrowd": 1}, {"id": 70_000, "category_id": 200}]
    annotations = [{"image_id": 1, "file_name": "a b.png", "segments_info": infos}]
    ids = np.zeros((6, 8), np.int64)
    ids[:, 4:] = 300
    ids[3:] = 70_000
    for split in ("train2017", "val2017"):
        arrange(tmp_path, annotations, split, categories, "panoptic")
        folder = tmp_path / ("annotations" if split == "train2017" else "") / f"panoptic_{split}"
        folder.mkdir()
        colors = np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)
        Image.fromarray(colors).save(folder / "a b.png")
    data = read_data(DataConfig(str(tmp_path)))
    assert data.classes == ["background", "table", "cup", "crowd of cups"]
    mask = read_mask(data.labeled[0].mask, data.labels)
    assert mask.tolist() == [[255] * 4 + [CUP] * 4] * 3 + [[0] * 8] * 3


@pytest.mark.parametrize(
    ("annotations", "match"),
    [
        pytest.param(
            [annotation(5, 47, []), annotation(6, 47, [])],
            r"2 annotations cannot .*\n  annotation 5 has a box and no segmentation, in a b.jpg\n  annotation 6 ",
            id="boxes",
        ),
        pytest.param(
            [annotation(5, 4, box(0, 0, 1, 1))],
            "annotation 5 is of category 4, which is none of the file's things: 7, 47, 90, in a b.jpg",
            id="category",
        ),
        pytest.param(
            [annotation(5, 47, [[1, 2, 3, 4]])],
            r"annotation 5 has the polygon \[1, 2, 3, 4\]; expected x, y of three points at least, in a b.jpg",
            id="two points",
        ),
        pytest.param([annotation(5, 47, [[]])], r"annotation 5 has the polygon \[\];", id="no points"),
        pytest.param([annotation(5, 47, [[[1, 2]] * 6])], r"annotation 5 has the polygon", id="pairs"),
        pytest.param(
            [annotation(5, 47, {"size": [8, 6], "counts": [48]})],
            r"annotation 5 is drawn on \[8, 6\] pixels, its picture has \[6, 8\], in a b.jpg",
            id="other size",
        ),
        pytest.param(
            [annotation(5, 47, {"size": [6, 8], "counts": ["x"]})],
            "the mask a b.png cannot be drawn",
            id="run",
        ),
        pytest.param([{"id": 5}], "is no COCO annotation file: KeyError: 'image_id'", id="keys"),
    ],
)
def test_wrong_annotations(tmp_path, annotations, match):
    arrange(tmp_path, annotations)
    with pytest.raises(DataError, match=match):
        read_data(DataConfig(str(tmp_path)))
    assert not list((tmp_path / "cache" / "data").glob("masks-*[!k]"))


LISTED = [
    {"id": number, "file_name": name, "height": 6, "width": 8}
    for number, name in enumerate(("unknown.jpg", "a b.jpg"))
]


def test_pictures_that_nobody_has_annotated_are_unlabelled(tmp_path, caplog):
    """As the tools list them for annotators; on the second start, too, where the masks are there already."""
    for split in ("train", "val"):
        arrange(tmp_path, SHAPES[:2], split, images=LISTED)
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            data = read_data(DataConfig(str(tmp_path)))
        assert [sample.name for sample in data.labeled] == ["train/a b.jpg"]
        assert [sample.name for sample in data.unlabeled] == ["train/unknown.jpg"]
        assert [sample.name for sample in data.val] == ["val/a b.jpg"]
        assert "1 of the 2 pictures that" in caplog.text
        assert "annotate any part of it with a category called background" in caplog.text
        assert "1 pictures to evaluate on have no mask and are left out" in caplog.text


def test_a_picture_of_background_is_annotated_as_such(tmp_path):
    shapes = [*SHAPES[:2], annotation(5, 1, box(0, 0, 1, 2), image=0)]
    for split in ("train", "val"):
        arrange(tmp_path, shapes, split, [*CATEGORIES, {"id": 1, "name": "background"}], images=LISTED)
    data = read_data(DataConfig(str(tmp_path)), unlabeled=False)
    assert [sample.name for sample in data.labeled] == ["train/a b.jpg", "train/unknown.jpg"]
    assert data.pixels == [24 + 48, 20, 4, 0]


def test_pictures_of_coco_without_an_annotation_are_background(tmp_path, caplog):
    categories = [
        {"id": number, "name": name}
        for number, name in zip(coco.THINGS, class_names("coco")[1:], strict=True)
    ]
    for split in ("train2017", "val2017"):
        arrange(tmp_path, SHAPES[:2], split, categories, images=LISTED)
    with caplog.at_level(logging.INFO):
        data = read_data(DataConfig(str(tmp_path)), unlabeled=False)
    assert len(data.labeled) == len(data.val) == 2
    assert (data.classes, data.pixels[0]) == (class_names("coco"), 24 + 48)
    assert "1 of the 2 pictures that" in caplog.text
    assert "they show background alone, as COCO means it" in caplog.text


@pytest.mark.parametrize(
    ("names", "classes", "pixels"),
    [
        pytest.param(["cup", "table", "cup"], ["cup", "table"], [20, 8, 20], id="twice"),
        pytest.param(["# hash", "table", "x"], ["# hash", "table", "x"], [20, 4, 20, 4], id="hash"),
        pytest.param(
            ["two\nlines", " table ", "x"], ["two lines", "table", "x"], [20, 4, 20, 4], id="spaces"
        ),
    ],
)
def test_names_of_categories_are_names_of_classes(tmp_path, names, classes, pixels):
    shapes = [
        annotation(1, 0, box(1, 1, 2, 2)),
        annotation(2, 1, box(0, 4, 8, 2)),
        annotation(3, 1, box(4, 0, 4, 1)),
        annotation(4, 2, box(6, 2, 2, 2)),
    ]
    for split in ("train", "val"):
        arrange(tmp_path, shapes, split, [{"id": number, "name": name} for number, name in enumerate(names)])
    data = read_data(DataConfig(str(tmp_path)))
    assert (data.classes, data.pixels) == (["background", *classes], pixels)


@pytest.mark.parametrize(
    ("categories", "match"),
    [
        pytest.param([], "names 0 categories of things beside the background; expected 1 to 254", id="none"),
        pytest.param(
            [{"id": number, "name": str(number)} for number in range(255)],
            "names 255 categories of things beside the background; expected 1 to 254, since masks are 8-bit",
            id="too many",
        ),
        pytest.param(
            [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "category 1 has two names", id="twice"
        ),
        pytest.param([{"id": 1, "name": " "}], "category 1 has no name", id="nameless"),
    ],
)
def test_wrong_categories(tmp_path, categories, match):
    arrange(tmp_path, [], categories=categories)
    with pytest.raises(DataError, match=match):
        read_data(DataConfig(str(tmp_path)))


def test_text_that_is_no_json(tmp_path):
    arrange(tmp_path, [])
    (tmp_path / "annotations" / "instances_train2017.json").write_bytes(b"\xff{")
    with pytest.raises(DataError, match=r"instances_train2017.json is no COCO annotation file"):
        read_data(DataConfig(str(tmp_path)))


def test_splits_of_drawn_masks_name_pictures_alone(tmp_path):
    root = tmp_path / "set"
    for part in ("train2017", "val2017"):
        arrange(root, SHAPES[:2], part)
    choose(DataConfig(str(root)), ["1/1"], 0, tmp_path / "splits")
    assert (tmp_path / "splits/1_1/labeled.txt").read_text() == "train2017/a b.jpg\t\n"
    data = read_data(DataConfig(str(root), labeled=str(tmp_path / "splits/1_1/labeled.txt")))
    assert data.pixels == [24, 20, 4, 0]


def test_pycocotools_is_an_extra(tmp_path, monkeypatch):
    arrange(tmp_path, SHAPES[:1])
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(DataError, match=r"pip install 'pseudoseg-fast\[coco\]'"):
        read_data(DataConfig(str(tmp_path)))


def test_names_that_lead_out_of_the_folder(tmp_path):
    assert coco_json._mask_name("../../etc/a.jpg", tmp_path) == "a.png"
    assert coco_json._mask_name("/etc/a.jpg", tmp_path) == "a.png"
    assert coco_json._mask_name("train2017\\a.jpg", tmp_path) == "a.png"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.jpg").touch()
    assert coco_json._mask_name("deep/a.jpg", tmp_path) == "deep/a.png"
