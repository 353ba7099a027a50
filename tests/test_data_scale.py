"""Large pools: little memory, and what is found out is found out once."""

import errno
import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pseudoseg_fast.config import DataConfig
from pseudoseg_fast.data import cache, listing, pool, read
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.layouts.tree import pair
from pseudoseg_fast.data.lists import DataError, Index, Sample
from pseudoseg_fast.data.pool import read_unlabeled
from pseudoseg_fast.data.read import check_masks
from pseudoseg_fast.data.samples import Joined, Names, Samples
from pseudoseg_fast.data.sets import read_others
from pseudoseg_fast.data.tags import Tags

NAMES = ["a b.jpg", "deep/z.jpg", "deep/ü.png", "last.jpg"]


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """Keep what is found out about a few files already."""
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path / "cache"))
    for module in (listing, pool, read):
        monkeypatch.setattr(module, "KEPT", 2)
    return tmp_path / "cache" / "data"


@pytest.fixture
def root(tmp_path):
    for name in NAMES:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    settle(tmp_path / "data")
    return tmp_path / "data"


def settle(*paths):
    """Let files and folders be old."""
    for path in paths:
        for each in [path, *path.rglob("*")]:
            os.utime(each, ns=(0, time.time_ns() - 10 * cache.SETTLED))


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    settle(path)
    return path


def never(*arguments):
    raise AssertionError("looked again")


def test_names():
    names = Names.of(["", "ü b", "\udce9", "z"])
    assert list(names) == ["", "ü b", "\udce9", "z"]
    assert (names[0], names[-2], list(names[1:3])) == ("", "\udce9", ["ü b", "\udce9"])
    with pytest.raises(IndexError):
        names[4]
    assert list(Names.of([])) == []


def test_samples_are_small_and_complete():
    samples = Samples(Path("/data"), Names.of(f"images/{number:08d}.jpg" for number in range(2000)))
    assert samples[-1] == Sample("images/00001999.jpg", Path("/data/images/00001999.jpg"))
    assert [sample.name for sample in samples[3:5]] == ["images/00000003.jpg", "images/00000004.jpg"]
    assert list(samples)[7] == samples[7]
    assert len(pickle.dumps(samples)) < 32 * len(samples)
    assert list(pickle.loads(pickle.dumps(samples))) == list(samples)


def test_tags_are_found_by_name():
    shown = np.eye(11, dtype=bool)[::-1]
    tags = Tags([f"{number}.jpg" for number in range(11)], shown)
    assert tags["10.jpg"] == (0,)
    assert {name: tags[name] for name in tags} == {f"{number}.jpg": (10 - number,) for number in range(11)}
    assert tags.get("11.jpg") is None
    assert not Tags()


def test_a_folder_is_walked_once(root, monkeypatch):
    assert list(listing.list_pictures(root)) == NAMES
    walk = listing.walk
    monkeypatch.setattr(listing, "walk", lambda folder, *seen: walk(folder) if not seen else never())
    assert list(listing.list_pictures(root)) == NAMES
    assert [sample.name for sample in pair(root, root, None).unlabeled] == NAMES


def test_what_is_not_read_is_named_each_time(root, caplog):
    for name in ("a.heic", "b.HEIC", "deep/c.heic", "deep/0001", "notes.txt", "a.JSON", ".hidden.gif"):
        (root / name).touch()
    settle(root)
    for _ in range(2):
        caplog.clear()
        assert list(listing.list_pictures(root)) == NAMES
        assert f"4 files below {root} are left out, since their suffixes are not read" in caplog.text
        for kind in (".heic (2)", ".HEIC (1)", "none (1)"):
            assert kind in caplog.text
        assert "expected .bmp, .jpeg," in caplog.text
        assert ".txt" not in caplog.text


def test_a_folder_that_changes_is_walked_again(root):
    listing.list_pictures(root)
    (root / "deep" / "more.jpg").touch()
    assert list(listing.list_pictures(root)) == sorted([*NAMES, "deep/more.jpg"])
    (root / "deep" / "more.jpg").rename(root / "deep" / "other.jpg")  # perhaps within one tick of the clock
    assert list(listing.list_pictures(root)) == sorted([*NAMES, "deep/other.jpg"])


def test_of_processes_together_one_walks(root, tmp_path, monkeypatch):
    walk = listing.walk

    def slow(folder, folders=None):
        if folders is not None:
            (tmp_path / f"walk-{os.getpid()}").touch()
            time.sleep(0.3)
        return walk(folder, folders)

    monkeypatch.setattr(listing, "walk", slow)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=listing.list_pictures, args=(root,)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("walk-*"))) == 1


def test_masks_are_not_looked_for_among_pictures_that_have_none(root, monkeypatch):
    labeled = [Sample(NAMES[0], root / NAMES[0], root / NAMES[2])]
    index = Index(Joined(labeled, Samples(root, Names.of(NAMES)), []))
    monkeypatch.setattr(Samples, "__iter__", never)
    others = read_others(DataConfig(str(root), unlabeled=str(root)), root, index, [])
    assert list(others.names) == [NAMES[0], NAMES[1], NAMES[3]]


def test_a_list_is_checked_once(root, monkeypatch):
    path = write(root / "list.txt", ["# names", "a b.jpg\tmasks/nowhere.png", "deep/ü.png", "last.jpg"])
    monkeypatch.setattr(pool, "_LISTED", 2)
    assert list(read_unlabeled(path, root).names) == ["a b.jpg", "deep/ü.png", "last.jpg"]
    monkeypatch.setattr(pool, "split_line", never)
    assert list(read_unlabeled(path, root).names) == ["a b.jpg", "deep/ü.png", "last.jpg"]
    write(path, ["last.jpg"])
    with pytest.raises(AssertionError, match="looked again"):
        read_unlabeled(path, root)


@pytest.mark.parametrize("asked", [1, 3, 100])
def test_names_with_spaces_and_further_columns_are_checked_once(root, monkeypatch, asked):
    for name in ("a", "last", "last.jpg copy.jpg", "deep/bare"):
        (root / name).touch()
    lines = {
        "a b.jpg": "a b.jpg",
        "last.jpg deep/nowhere.png": "last.jpg",
        "last.jpg nowhere.png": "last.jpg",
        "last.jpg 3": "last.jpg",
        "last.jpg copy.jpg": "last.jpg copy.jpg",
        "a b.jpg\tlast.jpg": "a b.jpg",
        "a b.jpg\t": "a b.jpg",
        "deep/z.jpg deep/ü.png": "deep/z.jpg",
        "deep/z.jpg 1 0": "deep/z.jpg",
        "deep/bare": "deep/bare",
    }
    monkeypatch.setattr(pool, "_LISTED", asked)
    monkeypatch.setattr(pool, "read_list", never)
    path = write(root / "list.txt", lines)
    for _ in range(2):
        assert list(read_unlabeled(path, root).names) == list(lines.values())
        monkeypatch.setattr(pool, "split_line", never)


def test_folders_of_many_pictures_are_listed_not_asked(root, monkeypatch):
    for number in range(20):
        (root / f"deep/{number}.jpg").touch()
    asked = []
    isfile = os.path.isfile
    monkeypatch.setattr(pool, "_LISTED", 3)
    path = write(root / "list.txt", [f"deep/{number}.jpg {number}_mask.png" for number in range(20)])
    monkeypatch.setattr(pool.os.path, "isfile", lambda name: asked.append(name) or isfile(name))
    assert len(read_unlabeled(path, root)) == 20
    assert len(asked) == 2


@pytest.mark.parametrize("asked", [1, 100])
def test_what_is_no_plain_name_is_read_line_by_line(root, monkeypatch, asked):
    """Such as the name of a picture without its suffix, whose first word is a folder."""
    monkeypatch.setattr(pool, "_LISTED", asked)
    (root / "deep 2.jpg").touch()
    index = Index([Sample("deep 2.jpg", root / "deep 2.jpg")])
    path = write(root / "list.txt", ["deep 2", "./last.jpg", "/last.jpg /deep/nowhere.png", "a b.jpg"])
    names = ["deep 2.jpg", "last.jpg", "last.jpg", "a b.jpg"]
    assert list(read_unlabeled(path, root, index).names) == names
    for line in ("last (2).jpg", "deep (2)", "deep z"):
        with pytest.raises(DataError, match=r"missing files in .*: 1;"):
            read_unlabeled(write(root / "list.txt", ["last.jpg", line]), root, index)


@pytest.mark.parametrize(
    "text", ["gone.jpg", "deep/gone.jpg", "nowhere/a.jpg", "../data/gone.jpg", "/etc/passwd"]
)
def test_lines_that_are_no_files_are_named(root, text):
    path = write(root / "list.txt", ["last.jpg", text])
    for _ in range(2):
        with pytest.raises(DataError, match=r"line 2"):
            read_unlabeled(path, root)


def test_masks_are_read_once(tmp_path, monkeypatch, kept):
    samples = []
    for number in range(3):
        image, mask = tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"
        Image.new("RGB", (4, 3)).save(image)
        Image.new("L", (4, 3), number).save(mask)
        samples.append(Sample(image.name, image, mask))
    settle(*(path for sample in samples for path in sample[1:]))
    count = read._count_pixels
    expected = 12 * np.eye(3, dtype=int)
    assert check_masks(samples, Labels(3)).tolist() == expected.tolist()
    monkeypatch.setattr(read, "_count_pixels", never)
    assert check_masks(samples, Labels(3)).tolist() == expected.tolist()
    with pytest.raises(AssertionError, match="looked again"):
        check_masks(samples, Labels(4))
    monkeypatch.setattr(read, "_count_pixels", count)
    Image.new("L", (4, 3), 1).save(samples[0].mask)
    assert check_masks(samples, Labels(3)).tolist() == expected[[1, 1, 2]].tolist()
    Image.new("L", (4, 3), 7).save(samples[0].mask)
    with pytest.raises(DataError, match="1 of 3 pictures with masks cannot be used"):
        check_masks(samples, Labels(3))


def test_what_is_kept_of_pictures_to_train_on_says_nothing_of_those_to_evaluate_on(root, kept):
    samples = []
    for number in range(3):
        image, mask = root / f"{number}.jpg", root / f"{number}.png"
        image.write_bytes(b"no picture")
        Image.new("L", (4, 3)).save(mask)
        samples.append(Sample(image.name, image, mask))
    settle(*(path for sample in samples for path in sample[1:]))
    assert check_masks(samples, Labels(2)).sum() == 36
    with pytest.raises(DataError, match="cannot be read as a picture"):
        check_masks(samples, Labels(2), {samples[0].image})


def test_a_damaged_cache_is_found_again(root, kept):
    listing.list_pictures(root)
    (file,) = kept.glob("files-*.npz")
    file.write_bytes(file.read_bytes()[:100])
    assert list(listing.list_pictures(root)) == NAMES


def test_what_a_killed_process_left_is_removed(kept):
    def fill(folder):
        if not list(kept.glob("*.lock")):
            raise AssertionError("no lock")
        (folder / "a").touch()

    folder = cache.keep_folder("masks", 1, fill)
    (folder / "a").unlink()
    folder.rmdir()
    for name, age in ((f".{folder.name}-old", 7200), (f".{folder.name}-young", 0)):
        (kept / name).mkdir()
        os.utime(kept / name, (time.time() - age,) * 2)
    assert cache.keep_folder("masks", 1, fill) == folder
    assert [path.name for path in kept.glob(".*")] == [f".{folder.name}-young"]


def test_nowhere_to_keep_it(root, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "cache_folders", lambda: [tmp_path / "file"])
    assert list(listing.list_pictures(root)) == NAMES
    assert "set PSEUDOSEG_CACHE to a folder that can be written" in caplog.text
    with pytest.raises(OSError, match="no folder to keep masks in; set PSEUDOSEG_CACHE"):
        cache.keep_folder("masks", 1, lambda folder: None)


def test_a_full_disk_costs_what_would_be_kept_alone(kept, monkeypatch, caplog):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    found = {"x": np.arange(3)}
    assert cache.remember("files", "all", lambda _: True, lambda: found) is found
    assert "files cannot be kept and will be computed again" in caplog.text
    with pytest.raises(
        OSError, match=r"demo cannot be kept in .*; set PSEUDOSEG_CACHE to a folder with room"
    ):
        cache.keep_folder("demo", 1, full)
    assert not [path for path in kept.iterdir() if path.suffix != ".lock"]
