"""Each layout from a few files, lists as others publish them, and one training run through four layouts."""

import logging
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from pseudoseg_fast.config import DataConfig, parse_config
from pseudoseg_fast.data.layouts import LAYOUTS, cityscapes, coco, guess, read_tree
from pseudoseg_fast.data.lists import DataError, Index, read_list
from pseudoseg_fast.data.pool import read_unlabeled
from pseudoseg_fast.data.read import read_mask
from pseudoseg_fast.data.sets import read_data, read_samples
from pseudoseg_fast.data.walk import walk
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader, val_loader
from pseudoseg_fast.scoring import evaluate
from pseudoseg_fast.trainer import Trainer

PICTURES = {
    "folder": ["images/train/a.jpg", "images/train/deep/b.png", "images/val/c.jpg"],
    "mmseg": ["img_dir/train/a.jpg", "img_dir/train/deep/b.png", "img_dir/val/c.jpg"],
    "ade20k": ["images/training/a.jpg", "images/training/b.jpg", "images/validation/c.jpg"],
    "voc": ["JPEGImages/a.jpg", "JPEGImages/b.jpg", "JPEGImages/c.jpg"],
    "coco": ["train2017/a.jpg", "train2017/b.jpg", "val2017/c.jpg"],
    "cityscapes": [
        "leftImg8bit/train/aachen/a_leftImg8bit.png",
        "leftImg8bit/train_extra/bonn/b_leftImg8bit.png",
        "leftImg8bit/val/ulm/c_leftImg8bit.png",
    ],
}
MASKS = {
    "folder": ["masks/train/a.png", "masks/val/c.png"],
    "mmseg": ["ann_dir/train/a.png", "ann_dir/val/c.png"],
    "ade20k": ["annotations/training/a.png", "annotations/validation/c.png"],
    "voc": ["SegmentationClassAug/a.png", "SegmentationClass/c.png"],
    "coco": ["stuffthingmaps/train2017/a.png", "stuffthingmaps/val2017/c.png"],
    "cityscapes": ["gtFine/train/aachen/a_gtFine_labelIds.png", "gtFine/val/ulm/c_gtFine_labelTrainIds.png"],
}


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 3), value).save(path)


def arrange(root, layout):
    """Write a data set of one labelled, one unlabelled and one val picture."""
    for name in (*PICTURES[layout], *MASKS[layout]):
        save(root / name, 0)
    if layout == "voc":
        lists = root / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("a\n")
        (lists / "val.txt").write_text("c\n")
    return root


@pytest.mark.parametrize("layout", PICTURES)
def test_layouts_are_recognised_and_read(tmp_path, layout):
    root = arrange(tmp_path, layout)
    assert guess(root, lists=False)[0] == layout
    tree = read_tree(layout, root)
    found = [[sample.name for sample in part] for part in (tree.labeled, tree.unlabeled, tree.val)]
    assert found == [[name] for name in PICTURES[layout]]
    assert [sample.mask for sample in (*tree.labeled, *tree.val)] == [root / name for name in MASKS[layout]]
    assert tree.unlabeled[0].mask is None
    assert tree.orphans == []
    assert list(tree.unmasked) == []
    if layout != "voc":  # which refuses it
        (root / MASKS[layout][1]).unlink()
        assert [sample.name for sample in read_tree(layout, root).unmasked] == [PICTURES[layout][2]]


@pytest.mark.parametrize("layout", PICTURES)
def test_bare_ids_stems_and_paths_are_found(tmp_path, layout):
    root = arrange(tmp_path, layout)
    tree = read_tree(layout, root)
    index = Index(tree.samples, tree.image_end)
    name = PICTURES[layout][0]
    for text in ("a", name, f"/{name}", os.path.splitext(name)[0], name.split("/", 1)[1], "a\tgone.png"):
        (root / "list.txt").write_text(f"{text}\n")
        samples = read_list("list.txt", root, index=index)
        assert [(sample.name, sample.mask) for sample in samples] == [(name, root / MASKS[layout][0])], text
        assert read_unlabeled("list.txt", root, index)[0][:2] == samples[0][:2]
        assert read_unlabeled("list.txt", root, index)[0].mask is None


def test_a_mask_that_a_list_names_counts_for_more_than_the_layouts(tmp_path):
    root = arrange(tmp_path, "voc")
    save(root / "SegmentationClass/a.png")
    (root / "list.txt").write_text("/JPEGImages/a.jpg /SegmentationClass/a.png\n")
    samples = read_list("list.txt", root, index=Index(read_tree("voc", root).samples))
    assert samples[0].mask == root / "SegmentationClass/a.png"


def test_ids_that_mean_two_pictures_are_refused(tmp_path):
    save(tmp_path / "images/train/x/a.png")
    save(tmp_path / "images/train/y/a.png")
    index = Index(read_tree("folder", tmp_path).samples)
    (tmp_path / "list.txt").write_text("a\n")
    with pytest.raises(DataError, match=r"line 1: a may be .*x/a.png, .*y/a.png; expected more of its path"):
        read_list("list.txt", tmp_path, "ignored", index)
    (tmp_path / "list.txt").write_text("y/a\n")
    assert read_list("list.txt", tmp_path, "ignored", index)[0].name == "images/train/y/a.png"


def test_an_id_with_a_dot_is_no_suffix(tmp_path):
    save(tmp_path / "images/train/scan.001.png")
    save(tmp_path / "masks/train/scan.001.png")
    tree = read_tree("folder", tmp_path)
    assert [sample.name for sample in tree.labeled] == ["images/train/scan.001.png"]
    assert [sample.name for sample in Index(tree.samples).find("scan.001")] == ["images/train/scan.001.png"]
    assert Index(tree.samples).find("scan") == []


@pytest.mark.parametrize(
    ("layout", "values", "expected", "classes"),
    [
        pytest.param("cityscapes", [0, 7, 33, 26, 255], [255, 0, 18, 13, 255], 19, id="cityscapes"),
        pytest.param("ade20k", [0, 1, 150, 255, 2], [255, 0, 149, 255, 1], 150, id="ade20k"),
        pytest.param("coco", [0, 89, 91, 255, 12], [1, 80, 0, 255, 12], 81, id="coco-stuff"),
    ],
)
def test_published_ids_are_converted(tmp_path, layout, values, expected, classes):
    root = arrange(tmp_path, layout)
    data = read_data(DataConfig(str(root)), labeled=layout == "cityscapes", unlabeled=False)
    assert len(data.classes) == classes
    Image.fromarray(np.array([values], np.uint8)).save(root / MASKS[layout][0])
    assert read_mask(root / MASKS[layout][0], data.labels).tolist() == [expected]


def test_made_train_ids_are_left_alone(tmp_path):
    root = arrange(tmp_path, "cityscapes")
    save(root / "gtFine/train/aachen/a_gtFine_labelTrainIds.png", 18)
    data = read_data(DataConfig(str(root)))
    assert data.labeled[0].mask.name == "a_gtFine_labelTrainIds.png"
    assert data.pixels[18] == 12


def test_tables_of_ids():
    assert len(coco.THINGS) == 80
    assert sorted(set(cityscapes.TO_TRAIN_IDS.values())) == [*range(19), 255]
    assert sorted(set(coco.FROM_STUFF.values())) == list(range(81))


def test_a_conversion_of_ones_own_replaces_the_layouts(tmp_path):
    root = arrange(tmp_path, "ade20k")
    data = read_data(DataConfig(str(root), reduce_zero_label=False))
    assert data.pixels[0] == 12


def test_a_map_of_ones_own_is_laid_over_the_layouts(tmp_path):
    """As check advises it for ids that mean nothing; with classes of one's own the layout's map means nothing."""
    root = arrange(tmp_path / "ade", "ade20k")
    save(root / MASKS["ade20k"][0], 2)
    for options in ({}, {"reduce_zero_label": True}):
        data = read_data(DataConfig(str(root), label_map={151: 255}, **options))
        assert (data.pixels[1], data.labels.label_map) == (12, {151: 255})
    root = arrange(tmp_path / "cityscapes", "cityscapes")
    save(root / MASKS["cityscapes"][0], 33)
    assert read_data(DataConfig(str(root), label_map={34: 255})).pixels[18] == 12
    (root / "classes.txt").write_text("".join(f"class {number}\n" for number in range(19)))
    assert read_data(DataConfig(str(root), label_map={34: 255})).pixels[18] == 12
    (root / "classes.txt").write_text("no bicycle\nbicycle\n")
    data = read_data(DataConfig(str(root), label_map={33: 1}))
    assert (data.classes, data.pixels) == (["no bicycle", "bicycle"], [0, 12])
    with pytest.raises(DataError, match=r"the layout's conversion .* leads to 2, 3"):
        read_data(DataConfig(str(root)))


def test_names_of_ones_own_count_for_more_than_the_layouts(tmp_path, caplog):
    root = arrange(tmp_path, "voc")
    (root / "classes.txt").write_text("ground\nwall\n")
    with caplog.at_level(logging.INFO):
        assert read_data(DataConfig(str(root))).classes == ["ground", "wall"]
    assert f"the 2 classes are those of {root / 'classes.txt'}, not the layout's" in caplog.text


def test_val_pictures_among_the_unlabelled_ones_are_left_out(tmp_path, caplog):
    root = arrange(tmp_path / "set", "folder")
    (root / "classes.txt").write_text("background\nsky\n")
    (root / "list.txt").write_text("images/val/c.jpg\nimages/train/a.jpg\n")
    for unlabeled, count in (("images", 2), ("list.txt", 1), (str(tmp_path), 4)):
        caplog.clear()
        data = read_data(DataConfig(str(root), unlabeled=unlabeled))
        assert len(data.unlabeled) == min(count, 2)  # without masks
        assert not any("c.jpg" in name for name in data.unlabeled.names)
        assert f"1 of {count + 1} pictures of {unlabeled} are val pictures, and left out" in caplog.text
    with pytest.raises(DataError, match="names val pictures alone"):
        read_data(DataConfig(str(root), unlabeled="images/val"))


def test_unlabelled_pictures_that_are_not_used_are_told_of(tmp_path, caplog):
    root = arrange(tmp_path / "set", "folder")
    for name in "de":
        save(root / f"images/train/{name}.jpg")
    save(tmp_path / "more" / "f.jpg")
    (root / "classes.txt").write_text("background\nsky\n")
    (root / "list.txt").write_text("images/train/d.jpg\n")
    for unlabeled, unused in ((str(tmp_path / "more"), 3), ("list.txt", 2), ("images/train", 0)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            read_data(DataConfig(str(root), unlabeled=unlabeled))
        told = (
            f"{unused} training pictures without a mask are not used, since data.unlabeled does not name them"
        )
        assert (told in caplog.text) == bool(unused)


@pytest.mark.parametrize("layout", ["folder", "lists"])
def test_masks_in_a_folder_of_unlabelled_pictures_are_left_out(tmp_path, caplog, layout):
    root = arrange(tmp_path, "folder")
    for name in ("images/train/d.jpg", "masks/train/d.png"):
        save(root / name)
    (root / "classes.txt").write_text("background\nsky\n")
    (root / "labeled.txt").write_text("images/train/a.jpg masks/train/a.png\n")
    (root / "val.txt").write_text("images/val/c.jpg masks/val/c.png\n")
    config = DataConfig(str(root), layout=layout, labeled="labeled.txt", val="val.txt", unlabeled=str(root))
    left = [f"images/train/{name}" for name in ("a.jpg", "d.jpg", "deep/b.png")]
    unknown = ["masks/train/d.png"] if layout == "lists" else []  # nobody says what it is
    assert list(read_data(config).unlabeled.names) == [*left, *unknown]
    assert f"{3 - len(unknown)} of 6 pictures of {root} are masks, and left out" in caplog.text
    with pytest.raises(DataError, match="masks/val names masks alone; expected pictures to learn from"):
        read_data(replace(config, unlabeled="masks/val"))
    (root / "list.txt").write_text("masks/train/a.png\n")  # whoever lists it means it
    assert list(read_data(replace(config, unlabeled="list.txt")).unlabeled.names) == ["masks/train/a.png"]


@pytest.mark.parametrize("layout", PICTURES)
def test_files_that_are_not_read_are_named_once(tmp_path, caplog, layout):
    root = arrange(tmp_path, layout)
    folders = [(root / names[layout][0]).parent for names in (PICTURES, MASKS)]
    for folder in folders:
        for name in ("x.gif", "x.heic", "y.heic", "y.json"):
            (folder / name).touch()
    read_tree(layout, root)
    assert len(caplog.records) == 2, caplog.text
    for record in caplog.records:
        assert record.levelno == logging.WARNING
        assert "3 files below" in record.getMessage()
        assert "are not read: .heic (2), .gif (1); expected .bmp" in record.getMessage()


def test_made_train_ids_of_coco_are_taken_before_what_they_were_made_of(tmp_path):
    root = arrange(tmp_path, "coco")
    shutil.rmtree(root / "stuffthingmaps")
    for name in ("train2017/a", "val2017/c"):
        save(root / f"annotations/{name}.png", 15)
        save(root / f"annotations/{name}_labelTrainIds.png", 14)
    (root / "classes.txt").write_text("".join(f"{number}\n" for number in range(20)))
    data = read_data(DataConfig(str(root)))
    assert (data.pixels[14], data.pixels[15]) == (12, 0)
    assert read_tree("coco", root).orphans == []


def test_folder_without_train_and_val(tmp_path, caplog):
    for name in ("images/a.png", "images/b.png", "images/c.jpg", "masks/a.png", "masks/b.png", "masks/z.png"):
        save(tmp_path / name)
    (tmp_path / "classes.txt").write_text("Background\nsky\n")
    (tmp_path / "val.txt").write_text("b\n")
    with pytest.raises(DataError, match=r"no pictures with masks to evaluate on .*--data.val LIST"):
        read_data(DataConfig(str(tmp_path)))
    data = read_data(DataConfig(str(tmp_path), val="val.txt", labeled="val.txt"))
    assert [sample.name for sample in data.unlabeled] == ["images/a.png", "images/c.jpg"]
    assert "1 of 1 labelled pictures are val pictures, too" in caplog.text
    with caplog.at_level(logging.INFO):
        data = read_data(DataConfig(str(tmp_path), val="val.txt"))
    assert [sample.name for sample in data.labeled] == ["images/a.png"]
    assert data.background == 0
    assert f"taking {tmp_path} for the layout folder, since it has images and masks" in caplog.text
    assert "1 masks have no picture, such as" in caplog.text


def test_lists_are_enough_where_folders_cannot_be_read(tmp_path, caplog):
    for name in ("images/a.png", "images/a.jpg", "images/b.png", "masks/a.png", "masks/b.png"):
        save(tmp_path / name)
    (tmp_path / "classes.txt").write_text("ground\nsky\n")
    (tmp_path / "val.txt").write_text("images/b.png masks/b.png\n")
    (tmp_path / "labeled.txt").write_text("images/a.jpg masks/a.png\n")
    config = DataConfig(str(tmp_path), val="val.txt", labeled="labeled.txt")
    assert read_data(config, unlabeled=False).layout == "lists"
    assert "the lists are taken alone: --data.layout lists" in caplog.text
    with pytest.raises(DataError, match="layout folder expects"):
        read_data(replace(config, layout="folder"), unlabeled=False)
    save(tmp_path / "annotations/training/x.png")
    for name in ("x.png", "x.jpg"):
        save(tmp_path / "images/training" / name)
    with pytest.raises(DataError, match="layout ade20k expects"):  # whose ids the lists do not know
        read_data(config, unlabeled=False)


def test_three_lists_say_it_all(tmp_path):
    for name in ("images/a.png", "images/b.png", "images/c.png", "masks/a.png", "masks/b.png"):
        save(tmp_path / name)
    (tmp_path / "classes.txt").write_text("ground\nsky\n")
    (tmp_path / "val.txt").write_text("images/b.png masks/b.png\n")
    (tmp_path / "labeled.txt").write_text("images/a.png masks/a.png\n")
    (tmp_path / "unlabeled.txt").write_text("images/a.png\n")
    config = DataConfig(str(tmp_path), val="val.txt", labeled="labeled.txt", unlabeled="unlabeled.txt")
    assert read_data(config).layout == "lists"
    data = read_data(replace(config, unlabeled=None))
    assert (data.layout, list(data.unlabeled.names)) == ("folder", ["images/c.png"])


def test_a_class_that_nothing_teaches_is_named(tmp_path, caplog):
    root = arrange(tmp_path, "folder")
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    read_data(DataConfig(str(root)))
    assert "no labelled picture shows road, car: the network cannot learn these 2 of 3 classes" in caplog.text


def test_pictures_of_nothing_are_refused_where_there_is_no_background(tmp_path):
    root = arrange(tmp_path, "folder")
    save(root / "images/train/d.jpg")
    (root / "tags.csv").write_text("image,tags\nimages/train/d.jpg,\nimages/train/e.jpg,sky\n")
    (root / "classes.txt").write_text("background\nsky\nroad\n")
    config = DataConfig(str(root), tags="tags.csv")
    assert read_data(config).tags["images/train/d.jpg"] == ()
    (root / "classes.txt").write_text("sky\nroad\ncar\n")
    with pytest.raises(
        DataError, match=r"images/train/d.jpg and 0 other pictures with nothing.*take out the lines"
    ):
        read_data(config)


def test_tags_from_hidden_masks(tmp_path, caplog):
    root = arrange(tmp_path, "folder")
    (root / "classes.txt").write_text("background\nsky\nroad\n")
    for name, value in (("b", 2), ("d", 0)):
        save(root / f"images/train/{name}.jpg")
        save(root / f"masks/train/{name}.png", value)
    save(root / "images/train/e.jpg")
    (root / "labeled.txt").write_text("images/train/a\n")
    with caplog.at_level(logging.INFO):
        data = read_data(DataConfig(str(root), labeled="labeled.txt", layout="folder", tags="masks"))
    expected = {"images/train/b.jpg": (2,), "images/train/d.jpg": (0,)}
    assert dict(data.tags) == expected
    assert all(sample.mask is None for sample in data.unlabeled)
    assert "the hidden masks of 2 of 4 unlabelled pictures are read, for their tags alone" in caplog.text
    lines = [*(f"{name} masks/train/{Path(name).stem}.png" for name in expected), "images/train/e.jpg"]
    (root / "unlabeled.txt").write_text("".join(f"{line}\n" for line in lines))
    for unlabeled, layout in (("unlabeled.txt", "lists"), ("images/train", "folder")):
        config = DataConfig(
            str(root),
            layout=layout,
            labeled="labeled.txt",
            unlabeled=unlabeled,
            val="val.txt",
            tags="masks",
            background=None,
        )
        (root / "val.txt").write_text("images/val/c.jpg masks/val/c.png\n")
        (root / "labeled.txt").write_text("images/train/a.jpg masks/train/a.png\n")
        tags = dict(read_data(config).tags)
        assert {name: tags[name] for name in expected} == expected, unlabeled
    save(root / "masks/train/d.png", 255)
    assert dict(read_data(config).tags).keys() == {"images/train/a.jpg", "images/train/b.jpg"}
    assert "1 of their masks are ignored altogether: these pictures are not tagged" in caplog.text


def test_a_folder_of_no_layout(tmp_path):
    arrange(tmp_path / "VOCdevkit" / "VOC2012", "voc")
    with pytest.raises(DataError) as error:
        guess(tmp_path, lists=False)
    assert f"did you mean --data.root {tmp_path / 'VOCdevkit' / 'VOC2012'}?" in str(error.value)
    assert all(f"{name}: " in str(error.value) for name in LAYOUTS)


@pytest.mark.parametrize("layout", PICTURES)
def test_a_layout_that_is_not_there(tmp_path, layout):
    (tmp_path / "stuff").mkdir()
    with pytest.raises(DataError, match=rf"layout {layout} expects .* in .*\n  no folder"):
        read_tree(layout, tmp_path)


def test_two_pictures_for_one_mask(tmp_path):
    root = arrange(tmp_path, "folder")
    save(root / "images/train/a.png")
    with pytest.raises(DataError, match=r"1 names below .* are shared by two files"):
        read_tree("folder", root)


@pytest.mark.parametrize("layout", PICTURES)
def test_labelled_pictures_may_be_among_the_unlabelled_ones(tmp_path, layout):
    tree = read_tree(layout, arrange(tmp_path, layout))
    labeled, unlabeled = PICTURES[layout][:2]
    for reuse, expected in ((False, [unlabeled]), (True, [labeled, unlabeled])):
        config = DataConfig(str(tmp_path), reuse_labeled=reuse)
        _, others, _ = read_samples(config, tmp_path, tree)
        assert sorted(sample.name for sample in others) == sorted(expected)
        assert all(sample.mask is None for sample in others)


def test_voc_ids_without_files(tmp_path):
    root = arrange(tmp_path, "voc")
    (root / "ImageSets/Segmentation/train.txt").write_text("a 1\nb 1\n")
    with pytest.raises(DataError, match=r"1 ids of train.txt and val.txt have no mask in .*\n  b$"):
        read_tree("voc", root)
    (root / "ImageSets/Segmentation/trainaug.txt").write_text("q\n")
    with pytest.raises(DataError, match=r"1 ids of .* have no picture"):
        read_tree("voc", root)


def test_voc_ids_may_have_spaces(tmp_path):
    root = arrange(tmp_path, "voc")
    for name in ("photo", "photo (1)", "photo (2)", "photo 1"):
        save(root / f"JPEGImages/{name}.jpg")
        save(root / f"SegmentationClass/{name}.png")
    lists = root / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("a\nphoto\nphoto (2)\t\n")
    (lists / "val.txt").write_text("photo (1)\nphoto 1\nc -1\n")
    tree = read_tree("voc", root)
    assert [Path(sample.name).stem for sample in tree.labeled] == ["a", "photo", "photo (2)"]
    assert [sample.mask.stem for sample in tree.val] == ["photo (1)", "photo 1", "c"]
    assert [Path(sample.name).stem for sample in tree.unlabeled] == ["b"]
    for name in ("photo (3)", "photo copy"):
        (lists / "val.txt").write_text(f"{name}\n")
        with pytest.raises(DataError, match=rf"1 ids of .* have no picture in .*\n  {re.escape(name)}"):
            read_tree("voc", root)


@pytest.mark.parametrize("rest", ["3", " 1", "-1", " 1 0", "\t1\t0", "{0}", "/x/{0}.png"])
def test_further_columns_of_voc_lists_are_left_out(tmp_path, rest):
    root = arrange(tmp_path, "voc")
    expected = read_tree("voc", root)
    for path in (root / "ImageSets/Segmentation").iterdir():
        ids = path.read_text().split()
        path.write_text("".join(f"{name} {rest.format(name)}\n" for name in ids))
    found = read_tree("voc", root)
    assert (found.labeled, found.val) == (expected.labeled, expected.val)
    assert [*found.unlabeled] == [*expected.unlabeled]


def test_walk_follows_links_but_not_in_circles(tmp_path):
    save(tmp_path / "away/a b ü.png")
    save(tmp_path / "set/.hidden/b.png")
    (tmp_path / "set/deep").mkdir()
    (tmp_path / "set/deep/away").symlink_to(tmp_path / "away")
    (tmp_path / "set/deep/circle").symlink_to(tmp_path / "set")
    (tmp_path / "set/broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "set/pipe.png")
    found = sorted(os.path.relpath(path, tmp_path / "set") for path in walk(tmp_path / "set"))
    assert found == ["broken.png", "deep/away/a b ü.png"]


def cast(source, samples, root, layout):
    """Write the same pictures in another layout; ``samples`` has (picture, mask or None) for train and val."""
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for part, names in samples.items():
        for picture, mask in names:
            image, ids = {
                "folder": (f"images/{part}", f"masks/{part}"),
                "mmseg": (f"img_dir/{part}", f"ann_dir/{part}"),
                "voc": ("JPEGImages", "SegmentationClass"),
                "lists": ("pictures", "ids"),
            }[layout]
            for folder, file in ((image, picture), (ids, mask)):
                if file:
                    (root / folder).mkdir(parents=True, exist_ok=True)
                    shutil.copy(source / file, root / folder / Path(file).name)
    parts = {"labeled": samples["train"], "unlabeled": samples["train"], "val": samples["val"]}
    for part, names in parts.items():
        chosen = [
            Path(picture)
            for picture, mask in names
            if part == "val" or (part == "labeled") == (mask is not None)
        ]
        if layout == "lists":
            lines = [
                f"pictures/{path.name}" + ("" if part == "unlabeled" else f" ids/{path.stem}.png")
                for path in chosen
            ]
            tiny.write(root / f"{part}.txt", lines)
        elif part != "unlabeled":
            tiny.write(
                root / f"ImageSets/Segmentation/{part.replace('labeled', 'train')}.txt",
                [p.stem for p in chosen],
            )
    shutil.copy(source / "classes.txt", root / "classes.txt")
    if layout != "lists":
        return {"data.labeled": None, "data.unlabeled": None, "data.val": None, "data.layout": layout}
    return {}


def losses(root, folder, changes):
    """The loss terms of a run's steps, and the scores after them."""
    config = parse_config(tiny.options(root, folder, changes), "", "")
    trainer = Trainer(config, folder)
    batches = zip(
        labeled_loader(config, trainer.data, trainer.network, 0),
        unlabeled_loader(config, trainer.data, trainer.network, 0),
        strict=True,
    )
    steps = [trainer.training_step([(labeled, unlabeled)], 1.0) for labeled, unlabeled in batches]
    scores = evaluate(trainer.network, val_loader(config.data, trainer.data), trainer.data.classes)
    return [{name: float(value) for name, value in terms.items()} for terms in steps], scores.miou


def compare(source, samples, tmp_path, changes):
    results = {}
    for layout in ("lists", "folder", "voc", "mmseg"):
        options = cast(source, samples, tmp_path / layout, layout)
        results[layout] = losses(tmp_path / layout, tmp_path / f"run-{layout}", changes | options)
    for layout in ("folder", "voc", "mmseg"):
        assert results[layout] == results["lists"], layout
    assert all(row.keys() == {"L_s", "L_sa", "L_x", "L_u"} for row in results["lists"][0])


def test_one_training_run_through_four_layouts(tmp_path):
    source = tiny.make_set(tmp_path / "source")
    train_part = [(f"images/{i}.png", None if i in (1, 2, 3) else f"masks/{i}.png") for i in (0, 1, 2, 3, 4)]
    samples = {"train": train_part, "val": [(f"images/{i}.png", f"masks/{i}.png") for i in (5, 6, 7)]}
    compare(source, samples, tmp_path, {})


@pytest.mark.skipif("CAMVID" not in os.environ, reason="needs the CamVid set: CAMVID=FOLDER")
def test_camvid_through_four_layouts(tmp_path):
    source = Path(os.environ["CAMVID"])

    def rows(name, count, masks=True):
        lines = [line.split() for line in (source / "splits" / name).read_text().splitlines()[:count]]
        return [(line[0], f"masks/{line[0][7:-4]}.png" if masks else None) for line in lines]

    train_part = sorted([*rows("1_8/labeled.txt", 3), *rows("1_8/unlabeled.txt", 5, masks=False)])
    samples = {"train": train_part, "val": rows("val.txt", 2)}
    compare(source, samples, tmp_path, {"data.crop_size": 64, "data.short_side": 96, "optim.steps": 2})
