"""Tags files: whatever is wrong with one is named with its line, and they tag the unlabelled pictures alone."""

import logging
import os
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import tiny

from pseudoseg_fast import check
from pseudoseg_fast.config import DataConfig
from pseudoseg_fast.data import tagged, tags
from pseudoseg_fast.data.lists import DataError
from pseudoseg_fast.data.sets import read_data

CLASSES = ["skin", "hair"]
LISTS = {name: f"{name}.txt" for name in ("labeled", "unlabeled", "val", "classes")}


def read(tmp_path, data):
    path = tmp_path / "tags.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return tags.read_tags(path, CLASSES)


def test_white_space_and_blank_lines_mean_nothing(tmp_path):
    found = read(tmp_path, "image, tags\r\n\r\n a.jpg , skin ; hair\r\n b c.jpg,\r\n  \r\n")
    assert found == {"a.jpg": (0, 1), "b c.jpg": ()}


def test_paths_are_plain(tmp_path):
    found = read(tmp_path, "image,tags\n./a.jpg,skin\nb//c.jpg,\n0.tar/./d.jpg,hair\n")
    assert found == {"a.jpg": (0,), "b/c.jpg": (), "0.tar/d.jpg": (1,)}
    with pytest.raises(DataError, match=r"line 3: a.jpg has tags already"):
        read(tmp_path, "image,tags\n./a.jpg,skin\na.jpg,skin\n")


def test_other_columns_are_passed_over(tmp_path):
    assert read(tmp_path, "split,tags,image,who\n1,hair,a.jpg,me\n1,,b.jpg\n") == {"a.jpg": (1,), "b.jpg": ()}


@pytest.mark.parametrize(
    ("data", "match"),
    [
        pytest.param(
            "image,tags\n\na.jpg\n",
            r"tags.csv, line 3: expected 'image,tags', got 'a.jpg'.* comma",
            id="short",
        ),
        pytest.param(
            'image,tags\na.jpg,skin\nb.jpg,"hair\nc.jpg,skin\n',
            r"tags.csv, line 3: .*expected 'image,tags', where quotation marks enclose all of a column",
            id="not closed",
        ),
        pytest.param(
            'image,tags\n"a"b.jpg,skin\n',
            r"tags.csv, line 2: .*quotation marks enclose all of a column, and those inside are doubled",
            id="closed too early",
        ),
        pytest.param(
            "image,tags,split,who\na.jpg,skin,hair,1,me\n",
            r"tags.csv, line 2: expected the 4 columns of the header, got 5; separate tags by ;",
            id="too many columns",
        ),
        pytest.param(
            "image;tags\na.jpg;skin\n",
            r"expected the header 'image,tags', with columns separated by commas, got 'image;tags'",
            id="semicolons",
        ),
        pytest.param(
            'image,tags\na.jpg,"' + 200_000 * "x",
            r"tags.csv, line 2: field larger.*quotation mark",
            id="huge",
        ),
        pytest.param(b"image,tags\na\xe4.jpg,skin\n", r"tags.csv is no UTF-8 text", id="Latin-1"),
        pytest.param("image,tags\n".encode("utf-16"), r"tags.csv is no UTF-8 text", id="UTF-16"),
        pytest.param("", r"no column image and no tags", id="nothing"),
    ],
)
def test_wrong_files(tmp_path, data, match):
    with pytest.raises(DataError, match=match):
        read(tmp_path, data)


def test_pictures_of_the_unlabelled_list_alone_count(tmp_path, caplog):
    root = tiny.make_set(tmp_path / "pictures")
    lines = ["images/1.png,disc", "images/2.png,", "images/5.png,square", "none.png,square", "2.png,square"]
    tiny.write(root / "tags.csv", ["image,tags", *lines])
    found = read_data(DataConfig(str(root), tags="tags.csv", **LISTS)).tags
    assert found == {"images/1.png": (1,), "images/2.png": ()}
    assert found.shares() == [0, 0.5, 0]
    assert "2 of 5 lines are of pictures that are not in use, and left out; 2 of 2 looked up" in caplog.text
    assert "such as images/0.png, got\n  2.png\n  none.png" in caplog.text
    tiny.write(root / "tags.csv", ["image,tags", *lines[:3]])
    caplog.clear()
    assert read_data(DataConfig(str(root), tags="tags.csv", **LISTS)).tags == found
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_of_many_other_pictures_a_few_are_looked_up(tmp_path, caplog, monkeypatch):
    root = tiny.make_set(tmp_path / "pictures")
    others = [f"others/{number:03}.png" for number in range(995)]
    tiny.write(
        root / "tags.csv",
        ["image,tags", "images/1.png,disc", "images/5.png,disc", *(f"{name}," for name in others)],
    )
    (root / "others").mkdir()
    for name in others:
        (root / name).touch()
    (root / others[300]).unlink()
    looked_up = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looked_up.append(path) or isfile(path))
    config = DataConfig(str(root), tags="tags.csv", **LISTS)
    assert read_data(config).tags == {"images/1.png": (1,)}
    assert len([path for path in looked_up if "others" in str(path)]) == 10
    assert "995 of 997 lines are of pictures that are not in use" in caplog.text
    assert "1 of 10 looked up do not exist" in caplog.text
    assert caplog.text.endswith(f"got\n  {others[300]}\n")


def test_a_file_of_all_shards_is_meant_for_some(tmp_path, caplog):
    root = tiny.make_set(tmp_path / "pictures")
    for shard in range(3):
        with tarfile.open(root / f"pool-{shard}.tar", "w") as file:
            for number in (1, 2):
                file.add(root / f"images/{number}.png", f"{number}.png")
    lines = [f"pool-{shard}.tar/{number}.png,disc" for shard in range(3) for number in (1, 2)]
    tiny.write(root / "tags.csv", ["image,tags", *lines])
    config = DataConfig(str(root), tags="tags.csv", **LISTS | {"unlabeled": "pool-{0..0}.tar"})
    found = read_data(config).tags
    assert found == {"pool-0.tar/1.png": (1,), "pool-0.tar/2.png": (1,)}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    tiny.write(root / "tags.csv", ["image,tags", *lines, "pool-0.tar/3.png,disc", "pool-3.tar/1.png,disc"])
    assert read_data(config).tags == found
    assert "6 of 8 lines are of pictures that are not in use, and left out; 2 of 6 looked up" in caplog.text
    assert "got\n  pool-0.tar/3.png\n  pool-3.tar/1.png" in caplog.text


@pytest.mark.parametrize(("unlabeled", "repeated"), [("[ab]/pool.tar", "1"), ("twice.tar", "2")])
def test_tags_of_several_pictures_of_one_name_are_refused(tmp_path, monkeypatch, unlabeled, repeated):
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path / "cache"))
    root = tiny.make_set(tmp_path / "pictures")
    for name, numbers in (("a/pool.tar", [1]), ("b/pool.tar", [1, 2]), ("twice.tar", [1, 2, 2])):
        (root / name).parent.mkdir(exist_ok=True)
        with tarfile.open(root / name, "w") as file:
            for number in numbers:
                file.add(root / f"images/{number}.png", f"{number}.png")
    lines = [f"{name}/{number}.png,disc" for name in ("pool.tar", "twice.tar") for number in (1, 2)]
    tiny.write(root / "tags.csv", ["image,tags", *lines])
    config = DataConfig(str(root), tags="tags.csv", **LISTS | {"unlabeled": unlabeled})
    name = f"{unlabeled.rpartition('/')[2]}/{repeated}.png"
    with pytest.raises(DataError, match=rf"tags 1 names that several pictures of .* may have; .*\n  {name}$"):
        read_data(config)
    assert len(read_data(replace(config, tags=None)).unlabeled) == 3
    if unlabeled != "twice.tar":  # of which nobody knows before it is read
        stream = {"unlabeled": f"pipe:cat {root}/{{1..2}}/pool.tar", "unlabeled_size": 3}
        with pytest.raises(DataError, match=r"tags 2 names that several pictures of .* may have"):
            read_data(replace(config, **stream))


def test_a_picture_may_be_listed_and_tagged_twice(tmp_path):
    root = tiny.make_set(tmp_path / "pictures")
    tiny.write(root / "unlabeled.txt", ["images/1.png", "images/1.png"])
    tiny.write(root / "tags.csv", ["image,tags", "images/1.png,disc"])
    assert read_data(DataConfig(str(root), tags="tags.csv", **LISTS)).tags == {"images/1.png": (1,)}


def test_tags_of_a_stream_are_those_of_its_shards(tmp_path, caplog):
    root = tiny.make_set(tmp_path / "pictures")
    stream = {"unlabeled": "pipe:aws s3 cp s3://bucket/pool-{0..1}.tar -", "unlabeled_size": 7}
    config = DataConfig(str(root), tags="tags.csv", **LISTS | stream)
    lines = [
        "pool-0.tar/a.png,disc",
        "pool-1.tar/b/c.png,square",
        "pool-2.tar/a.png,square",
        "pool.tar/a.png,",
    ]
    tiny.write(root / "tags.csv", ["image,tags", *lines])
    assert read_data(config).tags == {"pool-0.tar/a.png": (1,), "pool-1.tar/b/c.png": (2,)}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    tiny.write(root / "tags.csv", ["image,tags", *lines, "pool-0/a.png,disc"])
    assert len(read_data(config).tags) == 2
    assert "such as pool-0.tar/0007.jpg, got\n  pool-0/a.png" in caplog.text


def test_tags_of_a_stream_are_all_but_those_of_masked_pictures(tmp_path):
    root = tiny.make_set(tmp_path / "pictures")
    lines = ["images/0.png,square", "images/5.png,square"]
    stream = {"unlabeled": "http://127.0.0.1:9/0.tar", "unlabeled_size": 7}
    config = DataConfig(str(root), tags="tags.csv", **LISTS | stream)
    tiny.write(root / "tags.csv", ["image,tags", *lines, "0.tar/0.png,disc"])
    found = read_data(config).tags
    assert found == {"0.tar/0.png": (1,)}
    assert found.shares() == [0, 1, 0]
    tiny.write(root / "tags.csv", ["image,tags", *lines])
    with pytest.raises(
        DataError, match=r"tags no picture of http:.* such as 0.tar/0007.jpg, got images/0.png"
    ):
        read_data(config)


def test_tags_of_some_pictures():
    shown = np.eye(11, dtype=bool)
    every = tags.Tags([f"{number}.jpg" for number in range(11)], shown)
    assert every.only({"10.jpg", "2.jpg", "99.jpg"}) == {"10.jpg": (10,), "2.jpg": (2,)}
    assert dict(every.only(set())) == {}
    assert every.only({"99.jpg", *every}) is every


def test_shares_of_tagged_pictures(monkeypatch):
    shown = np.array([[0, 1, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0]], bool)
    monkeypatch.setattr(tags, "_CHUNK", 3)
    assert tags.Tags(list("badc"), shown).shares() == [0, 0.75, 0.25]
    assert tags.Tags().shares() == []


def test_a_class_of_most_masks_that_no_tags_name_is_told_of(tmp_path, caplog, capsys, monkeypatch):
    """It is forbidden in every label: most often it is the background, by another name."""
    monkeypatch.setattr(tagged, "ENOUGH", 1)
    root = tiny.make_set(tmp_path / "pictures")
    tiny.write(root / "tags.csv", ["image,tags", "images/1.png,disc"])
    read_data(DataConfig(str(root), tags="tags.csv", **LISTS))
    assert "most masks show square, and no line of data.tags names it" in caplog.text
    caplog.clear()
    read_data(DataConfig(str(root), tags="tags.csv", background=None, **LISTS))
    assert "most masks show background, square, and no line" in caplog.text
    options = [f"--data.{name}={value}" for name, value in LISTS.items()]
    check.main([f"--data.root={root}", "--data.tags=tags.csv", f"--picture={tmp_path / 'x.png'}", *options])
    assert "most masks show square, and no line" in capsys.readouterr().out
