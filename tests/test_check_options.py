"""The options of ``check``: what it reads, what it writes, and where."""

import dataclasses

import numpy as np
import pytest
import tiny
import yaml
from checking import make_set, run

from pseudoseg_fast import check
from pseudoseg_fast.config import DataConfig


@pytest.fixture
def root(tmp_path):
    return make_set(tmp_path / "set")


@pytest.fixture
def unread(monkeypatch):
    """Fail where pictures are read."""
    monkeypatch.setattr(check, "scan_sets", lambda *_: pytest.fail("all was read before this was noticed"))


def test_what_is_there_already_is_named_before_all_is_read(root, tmp_path, unread, capsys):
    (tmp_path / "data.yaml").write_text("")
    assert check.main([f"--data.root={root}", f"--save={tmp_path / 'data.yaml'}"]) == 2
    assert "data.yaml is there already; remove it, or choose another --save" in capsys.readouterr().err
    assert check.main([f"--data.root={root}", f"--picture={tmp_path / 'data.yaml/check.png'}"]) == 2


def test_a_picture_of_the_user_is_not_drawn_over(root, tmp_path, capsys):
    """--picture reads like the picture to check."""
    picture = next((root / "images" / "train").iterdir())
    before = picture.read_bytes()
    assert check.main([f"--data.root={root}", f"--picture={picture}"]) == 2
    assert "is there and is something else; remove it, or choose another name" in capsys.readouterr().err
    assert picture.read_bytes() == before
    for _ in range(2):
        assert run(capsys, root, f"--picture={tmp_path / 'drawn.png'}")[0] == 0


def test_folders_of_outputs_are_made(root, tmp_path, capsys):
    picture, saved = tmp_path / "a/check.png", tmp_path / "b/c/data.yaml"
    assert run(capsys, root, f"--picture={picture}", f"--save={saved}")[0] == 0
    assert picture.is_file()
    assert saved.stat().st_mode & 0o777 == picture.stat().st_mode & 0o777  # colleagues may read it


def test_a_picture_that_cannot_be_written_costs_no_report(root, tmp_path, capsys):
    status, printed = run(capsys, root, f"--picture={tmp_path / 'check.xyz'}")
    assert status == 0
    assert "labelled: 3 pictures" in printed
    assert "warning: no samples could be drawn to" in printed


def test_channels_are_those_of_the_pictures(root, tmp_path, capsys):
    tifffile = pytest.importorskip("tifffile")
    for number, path in enumerate(sorted((root / "images").rglob("*.png"))):
        pixels = np.full((4, 6, 5), number, np.uint8)
        tifffile.imwrite(path.with_suffix(".tif"), pixels, photometric="minisblack", planarconfig="contig")
        path.unlink()
    (tmp_path / "three.yaml").write_text("model: {in_channels: 3}\n")
    for arguments in ([], [f"--config={tmp_path / 'three.yaml'}"]):
        status, printed = run(capsys, root, *arguments)
        assert status == 0, printed
        expected = (
            "warning: the pictures have 5 channels, the configuration 3: train with --model.in_channels 5"
        )
        assert expected in printed
    status, printed = run(capsys, root, f"--save={tmp_path / 'data.yaml'}")
    assert status == 0, printed
    assert "the pictures have 5 channels, the configuration 3: --save writes 5" in printed
    assert "warning: the pictures" not in printed
    model = yaml.safe_load((tmp_path / "data.yaml").read_text())["model"]
    assert model["in_channels"] == len(model["mean"]) == len(model["std"]) == 5
    for argument in ("--model.in_channels=3", "--model.in_channels=4"):
        status, printed = run(capsys, root, argument)
        assert status == 1
        assert f"0.tif has 5 channels, expected {argument[-1]}" in printed
    # What is saved says it, too.
    assert check.main([f"--config={tmp_path / 'data.yaml'}", f"--picture={tmp_path / 'check.png'}"]) == 0
    assert "the pictures have" not in capsys.readouterr().out


@pytest.mark.parametrize(("extra", "channels"), [("unspecified", 4), ("unassalpha", 3)])
def test_a_fourth_channel_that_is_no_alpha_is_found(root, tmp_path, capsys, extra, channels):
    tifffile = pytest.importorskip("tifffile")
    for number, path in enumerate(sorted((root / "images").rglob("*.png"))):
        pixels = np.full((4, 6, 4), 10 * number, np.uint8)
        tifffile.imwrite(path.with_suffix(".tif"), pixels, photometric="rgb", extrasamples=[extra])
        path.unlink()
    status, printed = run(capsys, root, f"--save={tmp_path / 'data.yaml'}")
    assert status == 0, printed
    assert ("the pictures have 4 channels, the configuration 3: --save writes 4" in printed) == (
        channels == 4
    )
    model = yaml.safe_load((tmp_path / "data.yaml").read_text())["model"]
    assert model["in_channels"] == channels
    assert set(model) == ({"in_channels", "mean", "std"} if channels == 4 else {"in_channels"})


def test_presets_and_saved_options_are_read(root, tmp_path, capsys):
    (root / "classes.txt").rename(root / "names.txt")
    saved = tmp_path / "data.yaml"
    assert run(capsys, root, "--data.classes=names.txt", f"--save={saved}")[0] == 0
    assert run(capsys, root, "--config", "small", "--config", str(saved))[0] == 0
    assert tiny.status(check.main, ["--config=smal", f"--data.root={root}"]) == 2
    assert "did you mean 'small'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "given"),
    [
        (["--config=small"], {}),
        (["--config=small", "--data.crop_size=513", "--data.scales=[1]"], {}),
        (["--config=camvid"], {"layout": "folder"}),
        (
            ["--data.ignore_index=254", "--data.label_map=7:1", "--data.background=null"],
            {"background": None, "ignore_index": 254, "label_map": "7:1"},
        ),
    ],
)
def test_what_describes_the_set_is_saved_and_nothing_else(root, tmp_path, capsys, preset, given):
    saved = tmp_path / "data.yaml"
    run(capsys, root, *preset, "--data.classes=classes.txt", f"--save={saved}")
    values = yaml.safe_load(saved.read_text())
    assert values["data"] == {"root": str(root), "classes": "classes.txt", **given}
    assert set(values["model"]) == {"in_channels"}


def test_a_saved_configuration_finds_its_files_from_everywhere(root, tmp_path, monkeypatch, capsys):
    tiny.write(root / "val.txt", ["images/val/4.png masks/val/4.png"])
    tiny.write(tmp_path / "mine.txt", ["images/train/0.png masks/train/0.png"])
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data.yaml"
    assert run(capsys, root, f"--save={path}", "--data.labeled=mine.txt", "--data.val=val.txt")[0] == 0
    saved = yaml.safe_load(path.read_text())["data"]
    assert saved == {"root": str(root), "labeled": str(tmp_path / "mine.txt"), "val": "val.txt"}


def test_what_lies_here_is_known(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masks").mkdir()
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool-0.tar").touch()
    for name, value, there in (
        ("tags", "masks", False),
        ("tags", "tags.csv", False),
        ("label_map", "7:1", False),
        ("unlabeled", "pool", True),
        ("unlabeled", "pool-{0..3}.tar", True),
        ("unlabeled", "s3://bucket/pool-{0..3}.tar", False),
        ("unlabeled", None, False),
    ):
        assert check.lies_here(name, value) is there, (name, value)


def test_options_are_saved_or_known_to_be_of_training():
    training = {"short_side", "crop_size", "scales", "color_jitter", "cutout", "cache", "workers"}
    assert {field.name for field in dataclasses.fields(DataConfig)} == training.union(check.SAVED)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--pictur=x", "did you mean '--picture'?"),
        ("--sav=x", "did you mean '--save'?"),
        ("--save", "argument --save: expected one argument\npython -m pseudoseg_fast.check --help lists all"),
        ("--save=", "--save expects the name of a file, got an empty one"),
        ("--picture=", "--picture expects the name of a file, got an empty one"),
    ],
)
def test_options_of_its_own_are_options_like_all_others(root, unread, capsys, argument, expected):
    assert tiny.status(check.main, [f"--data.root={root}", argument]) == 2
    assert expected in capsys.readouterr().err


def test_help_has_all_options(capsys):
    assert tiny.status(check.main, ["--help"]) == 0
    usage, _, options = capsys.readouterr().out.partition("\noptions:\n")
    for option in ("--picture FILE", "--save FILE", "--data.root ROOT"):
        assert option in usage
        assert option in options
