import os
import shutil

import numpy as np
import pytest
import tiny
from PIL import Image

from pseudoseg_fast import split
from pseudoseg_fast.data.lists import Sample, read_list
from pseudoseg_fast.data.pool import read_unlabeled


@pytest.fixture
def root(tmp_path):
    """Forty pictures in the layout folder; class 2 is in one of them alone, class 3 in none."""
    root = tmp_path / "a set"
    for part, count in (("train", 42), ("val", 2)):
        for folder in ("images", "masks"):
            (root / folder / part).mkdir(parents=True)
        for number in range(count):
            ids = np.full((3, 4), number % 2, np.uint8)
            ids[0, 0] = 2 if number == 17 else ids[0, 0]
            Image.new("L", (4, 3)).save(root / f"images/{part}/a {number:02}.png")
            if number < 40:
                Image.fromarray(ids).save(root / f"masks/{part}/a {number:02}.png")
    tiny.write(root / "classes.txt", ["even", "odd", "rare", "never"])
    return root


def run(root, output, *arguments):
    return tiny.status(split.main, [f"--data.root={root}", f"--output={output}", *arguments])


def test_splits_are_nested_and_show_every_class(root, tmp_path, capsys):
    assert run(root, tmp_path / "out", "--labeled", "1/8", "1/4", "20", "--seed=3") == 0
    sets, printed = {}, capsys.readouterr().out
    for name, count in (("1_8", 5), ("1_4", 10), ("20", 20)):
        labeled = read_list(tmp_path / "out" / name / "labeled.txt", root)
        unlabeled = read_unlabeled(tmp_path / "out" / name / "unlabeled.txt", root)
        sets[name] = {sample.name for sample in labeled}
        assert len(sets[name]) == count
        assert len(unlabeled) == 42 - count
        assert sets[name].isdisjoint(sample.name for sample in unlabeled)
        assert "images/train/a 17.png" in sets[name]
        assert {np.array(Image.open(sample.mask))[1, 1] for sample in labeled} == {0, 1}
    assert sets["1_8"] < sets["1_4"] < sets["20"]
    rare = next(line for line in printed.splitlines() if line.startswith("rare"))
    assert rare.split()[1::2] == ["1", "1", "1", "1"]
    assert f"--data.labeled {tmp_path / 'out/1_8/labeled.txt'}" in printed


def test_the_layout_is_named_with_its_reason(root, tmp_path, caplog):
    assert run(root, tmp_path / "out", "--labeled=1/4") == 0
    assert "for the layout folder, since it has images and masks; --data.layout says otherwise" in caplog.text


@pytest.mark.parametrize("name", [b"\xff", b"line\nbreak", b"tab\t", b"return\r"])
def test_names_that_lists_cannot_hold_are_refused(root, tmp_path, capsys, name):
    name = os.fsdecode(name)
    (root / "images/train/a 41.png").rename(root / f"images/train/{name}.png")
    assert run(root, tmp_path / "out", "--labeled=1/4") == 2
    printed = capsys.readouterr().err
    assert "1 names cannot be written to a list; expected UTF-8 without tabs and line breaks" in printed
    assert repr(f"images/train/{name}.png") in printed
    assert not (tmp_path / "out").exists()


def test_any_white_space_within_names_is_kept(tmp_path):
    samples = [Sample("a\xa0b.png", tmp_path / "a\xa0b.png", tmp_path / "m.png")]
    samples[0].image.touch()
    samples[0].mask.touch()
    lists = {"labeled": samples, "unlabeled": [samples[0]._replace(mask=None)]}
    split.write_lists(tmp_path / "out", tmp_path, lists)
    assert read_list(tmp_path / "out/labeled.txt", tmp_path) == samples
    assert [*read_unlabeled(tmp_path / "out/unlabeled.txt", tmp_path)] == [samples[0]._replace(mask=None)]


def test_val_pictures_are_neither_labelled_nor_unlabelled(root, tmp_path):
    """Nor do masked pictures vanish that are on no list."""
    held_out = [f"images/train/a {number:02}.png" for number in range(5)]
    listed = [f"images/train/a {number:02}.png" for number in range(3, 20)]
    tiny.write(root / "val.txt", [f"{name}\t" for name in held_out])
    tiny.write(root / "labeled.txt", [f"{name}\t" for name in listed])
    lists = (f"--data.val={root / 'val.txt'}", f"--data.labeled={root / 'labeled.txt'}")
    assert run(root, tmp_path / "out", *lists[:1], "--labeled", "1/1") == 0
    assert run(root, tmp_path / "listed", *lists, "--labeled", "1/1") == 0
    for output, count in (("out", 35), ("listed", 15)):
        labeled = read_list(tmp_path / output / "1_1" / "labeled.txt", root)
        unlabeled = read_unlabeled(tmp_path / output / "1_1" / "unlabeled.txt", root)
        names = [sample.name for sample in [*labeled, *unlabeled]]
        assert len(labeled) == count
        assert len(names) == len(set(names)) == 37
        assert set(names).isdisjoint(held_out)


@pytest.fixture
def without_val(root):
    for folder in ("images", "masks"):
        shutil.rmtree(root / folder / "val")
    return root


def read_split(folder, root):
    return {
        name: {sample.name for sample in read_list(folder / f"{name}.txt", root, masks="optional")}
        for name in ("labeled", "unlabeled", "val")
    }


def test_pictures_are_held_out_for_evaluation(without_val, tmp_path, capsys):
    root, output = without_val, tmp_path / "an output"
    assert run(root, output, "--val=5", "--labeled", "1/1", "1/5", "--seed=1") == 0
    printed = capsys.readouterr().out
    everything, few = read_split(output / "1_1", root), read_split(output / "1_5", root)
    assert few["val"] == everything["val"]
    assert len(few["val"]) == 5
    assert [len(everything[name]) for name in ("labeled", "unlabeled")] == [35, 2]
    assert [len(few[name]) for name in ("labeled", "unlabeled")] == [7, 30]
    assert len(set.union(*few.values())) == 42
    assert "images/train/a 17.png" in few["labeled"]  # the rare class has no other
    val = read_list(output / "1_5" / "val.txt", root)
    assert {np.array(Image.open(sample.mask))[1, 1] for sample in val} == {0, 1}
    lines = printed.splitlines()
    assert [line.split()[3:5] for line in lines if line.startswith("rare")] == [["0", "0.00"]]
    assert f"--data.val '{output}/1_5/val.txt'" in lines[-1]


def test_all_others_keep_their_masks_where_val_is_all_that_is_asked_for(without_val, tmp_path, capsys):
    for number in (40, 41):
        (without_val / f"images/train/a {number:02}.png").unlink()
    assert run(without_val, tmp_path / "out", "--val", "1/8") == 0
    assert sorted(path.name for path in (tmp_path / "out/1_1").iterdir()) == ["labeled.txt", "val.txt"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("val.txt --method.name supervised")


@pytest.mark.parametrize("val", ["40", "39"])
def test_no_more_are_held_out_than_leave_each_class(without_val, tmp_path, capsys, val):
    assert run(without_val, tmp_path / "out", f"--val={val}") == 2
    printed = capsys.readouterr().err
    assert f"--val {val}: of the 40 pictures with masks 38 can be held out" in printed
    assert not (tmp_path / "out").exists()


def test_held_out_pictures_show_the_rarest_classes_first():
    shown = np.array([[1, 0, 0, 0]] * 5 + [[1, 1, 0, 0]] * 2 + [[1, 0, 1, 0]] * 3 + [[0, 0, 0, 1]])
    chosen = split.hold_out(shown, 2, seed=0)
    assert shown[chosen].sum(0).tolist() == [2, 1, 1, 0]
    with pytest.raises(ValueError, match=r"3 pictures with masks 0 can be held out.*; draw more masks"):
        split.hold_out(np.eye(3, dtype=np.int64), 1, seed=0)


def test_what_val_needs(root, tmp_path, capsys):
    for arguments, expected in (
        (["--val=5"], "has 2 val pictures already, by the layout folder; leave --val out"),
        ([], "expected --val NUMBER, to hold out pictures for evaluation, or --labeled SHARE"),
    ):
        assert run(root, tmp_path / "out", *arguments) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("pool", ["../pool", "pool-*.tar", "http://127.0.0.1:9/{0..9}.tar"])
def test_pictures_that_no_list_can_name_are_refused(root, tmp_path, capsys, pool):
    (tmp_path / "pool").mkdir()
    Image.new("L", (4, 3)).save(tmp_path / "pool" / "a 00.png")
    given = tmp_path / "pool" if pool == "../pool" else pool
    assert run(root, tmp_path / "out", "--labeled=1/4", f"--data.unlabeled={given}") == 2
    assert "lie outside it: leave the option out here, and give it to training" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_seed_decides(root, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run(root, tmp_path / name, "--labeled=1/4", f"--seed={seed}") == 0
    texts = [(tmp_path / name / "1_4/labeled.txt").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_nothing_is_overwritten(root, tmp_path, capsys):
    assert run(root, tmp_path / "out", "--labeled=1/4") == 0
    before = (tmp_path / "out/1_4/labeled.txt").read_text()
    assert run(root, tmp_path / "out", "--labeled", "1/2", "1/4", "--seed=1") == 2
    assert "is there already; remove it, or choose another --output" in capsys.readouterr().err
    assert (tmp_path / "out/1_4/labeled.txt").read_text() == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1_4"]


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ("1", "1 pictures (1) cannot show every class"),
        ("41", "a share of the 40 pictures with masks"),
        ("1/0", "got '1/0'"),
        ("few", "got 'few'"),
        ("-1/4", "--labeled"),
        ("1/1000", "got '1/1000'"),
    ],
)
def test_wrong_shares(root, tmp_path, capsys, share, expected):
    assert run(root, tmp_path / "out", f"--labeled={share}") == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
