import logging

import numpy as np
import pytest
from PIL import Image

from pseudoseg_fast.config import DataConfig
from pseudoseg_fast.data.labels import Labels, read_color_map, read_label_map
from pseudoseg_fast.data.layouts.tree import Tree
from pseudoseg_fast.data.lists import DataError
from pseudoseg_fast.data.read import read_mask
from pseudoseg_fast.data.sets import conversion

IDS = np.array([[0, 1, 2], [2, 255, 1]], np.uint8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        pytest.param(Labels(3), [[0, 1, 2], [2, 255, 1]], id="as they are"),
        pytest.param(Labels(2, reduce_zero_label=True), [[255, 0, 1], [1, 255, 0]], id="zero is ignored"),
        pytest.param(
            Labels(3, ignore_index=1, label_map={255: 0}), [[0, 255, 2], [2, 0, 255]], id="other ignored id"
        ),
        pytest.param(
            Labels(2, label_map={255: 1, 1: 255, 2: 0}), [[0, 255, 0], [0, 1, 255]], id="map before ignore"
        ),
        pytest.param(
            Labels(3, layout_map={1: 2}, map_only="*_ids.png"), [[0, 1, 2], [2, 255, 1]], id="other files"
        ),
        pytest.param(
            Labels(3, layout_map={1: 2}, map_only="*k.png"), [[0, 2, 2], [2, 255, 2]], id="these files"
        ),
        pytest.param(
            Labels(3, label_map={2: 0}, layout_map={1: 2, 2: 1}),
            [[0, 2, 0], [0, 255, 2]],
            id="over the layout's",
        ),
        pytest.param(
            Labels(2, label_map={0: 0}, reduce_zero_label=True), [[0, 0, 1], [1, 255, 0]], id="but for zero"
        ),
    ],
)
def test_conversions(tmp_path, dtype, labels, expected):
    path = tmp_path / "mask.png"
    Image.fromarray(IDS.astype(dtype)).save(path)
    mask = read_mask(path, labels)
    assert mask.dtype == np.uint8
    assert mask.tolist() == expected


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        pytest.param(Labels(2), r"ids 2; expected 0 to 1, or 255.*label_map", id="no class"),
        pytest.param(
            Labels(1, reduce_zero_label=True), r"ids 2; expected 1 to 1, or 255", id="no class but zero"
        ),
        pytest.param(Labels(3, ignore_index=9), r"ids 255; expected 0 to 2, or 9", id="255 is not ignored"),
        pytest.param(Labels(2, label_map={1: 0}), r"ids 2;", id="not in the map"),
    ],
)
def test_the_check_comes_after_the_conversion(tmp_path, labels, match):
    Image.fromarray(IDS).save(tmp_path / "mask.png")
    with pytest.raises(DataError, match=match):
        read_mask(tmp_path / "mask.png", labels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours(tmp_path, mode):
    (tmp_path / "colors.csv").write_text("name,r,g,b\nsky,0,0,255\ntraffic light,9,8,7\nignore,255,255,255\n")
    colors, names = read_color_map("colors.csv", tmp_path)
    assert names == ["sky", "traffic light"]
    pixels = np.array([[(0, 0, 255), (9, 8, 7), (255, 255, 255)]], np.uint8)
    image = Image.fromarray(pixels)
    (image.quantize(8) if mode == "P" else image.convert(mode)).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", Labels(2, color_map=colors)).tolist() == [[0, 1, 255]]
    with pytest.raises(DataError, match=r"mask.png holds 1 colours that no class has: \(9, 8, 7\)"):
        read_mask(tmp_path / "mask.png", Labels(2, color_map={(0, 0, 255): 0, (255, 255, 255): 1}))


def test_color_map_with_classes_and_ids(tmp_path):
    (tmp_path / "colors.txt").write_text("# roads\n128 64 128 road\n0 0 0\tignore\n")
    assert read_color_map("colors.txt", tmp_path, ["sky", "road"])[0] == {(128, 64, 128): 1, (0, 0, 0): 255}
    (tmp_path / "ids.txt").write_text("1 2 3 0\n4 5 6 0\n")
    assert read_color_map("ids.txt", tmp_path, ["sky"])[0] == {(1, 2, 3): 0, (4, 5, 6): 0}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        pytest.param("1 2 3 rood\n", "line 1: 'rood' is not a class; did you mean 'road'", id="typo"),
        pytest.param("1 2 3 road\n1 2 3 sky\n", "line 2: the colour 1 2 3 has a class already", id="twice"),
        pytest.param("1 2 3 road\n1 2 sky\n", "line 2: expected 'r g b class'", id="short"),
        pytest.param("1 2 300 road\n", "colours are 0 to 255", id="range"),
        pytest.param("# none\n", "is empty", id="empty"),
    ],
)
def test_wrong_color_map(tmp_path, text, match):
    (tmp_path / "colors.txt").write_text(text)
    with pytest.raises(DataError, match=match):
        read_color_map("colors.txt", tmp_path, ["sky", "road"])


def test_label_maps(tmp_path):
    assert read_label_map("7:1, 9:255", tmp_path) == {7: 1, 9: 255}
    for text in ("7-:1", "²:1"):
        with pytest.raises(DataError, match="no file at"):
            read_label_map(text, tmp_path)
    (tmp_path / "map.yaml").write_text("7: 1\n9: 255\n")
    assert read_label_map("map.yaml", tmp_path) == {7: 1, 9: 255}
    (tmp_path / "bad.yaml").write_text("- 7\n")
    with pytest.raises(DataError, match="expects a line 'from: to'"):
        read_label_map("bad.yaml", tmp_path)
    with pytest.raises(DataError, match="no file at"):
        read_label_map("7:1:2", tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"classes": 256}, "classes must be 1 to 255", id="classes"),
        pytest.param(
            {"classes": 2, "label_map": {0: 2}}, "data.label_map leads to 2; expected 0 to 1", id="target"
        ),
        pytest.param(
            {"classes": 2, "layout_map": {0: 3}},
            "the layout's conversion .* leads to 3",
            id="layout's target",
        ),
        pytest.param(
            {"classes": 2, "color_map": {(0, 0, 0): 1}, "reduce_zero_label": True},
            "expected colours or ids, got color_map and reduce_zero_label",
            id="two",
        ),
    ],
)
def test_wrong_labels(options, match):
    with pytest.raises(ValueError, match=match):
        Labels(**options)


def test_a_map_of_too_many_colours_is_wrong_data():
    """And not a wrong option, which would cost the report of check."""
    with pytest.raises(DataError, match="classes must be 1 to 255"):
        Labels(256)


def test_ids_of_classes_of_ones_own_count_from_0(tmp_path, caplog):
    """Whatever the layout's own classes count from: what has no class then is named, and nothing is shifted."""
    tree = Tree(classes=["sky", "road"], reduce_zero_label=True)

    def reduced(classes, **options):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            return conversion(DataConfig(str(tmp_path), **options), tmp_path, tree, classes).reduce_zero_label

    assert reduced(2)
    assert not caplog.text
    for classes in (1, 3):
        assert not reduced(classes)
        assert f"since the {classes} classes are not those of the layout" in caplog.text
        assert "give --data.reduce_zero_label true" in caplog.text
        assert reduced(classes, reduce_zero_label=True)
        assert not reduced(classes, reduce_zero_label=False)
        assert not caplog.text
