import re
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import numpy as np
import pytest
from PIL import Image

from pseudoseg_fast.data.demo import demo_root
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import read_classes, read_list
from pseudoseg_fast.data.pool import read_unlabeled
from pseudoseg_fast.data.read import check_masks
from pseudoseg_fast.data.tags import read_tags

unpack = demo_root.__wrapped__  # without the cache of this process


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PSEUDOSEG_CACHE", str(tmp_path_factory.mktemp("cache")))
        return unpack()


def position(sample):
    row, column = re.fullmatch(r"images/r(\d{4})_c(\d{4})\.jpg", sample.name).groups()
    return int(row), int(column)


def test_archive_ships_small_and_with_its_licences(root):
    assert len(resources.files("pseudoseg_fast.data").joinpath("demo.zip").read_bytes()) <= 2_500_000
    notice = (root / "NOTICE.txt").read_text()
    for path in re.findall(r"licenses/[\w.-]+\.txt", notice):
        assert "Copyright" in (root / path).read_text()
    assert "NASA" in notice
    assert "Rubel" in notice


def test_lists_agree(root):
    train, val, labeled = (read_list(f"splits/{name}.txt", root) for name in ("all", "val", "labeled"))
    unlabeled = read_unlabeled("splits/unlabeled.txt", root)
    assert len(train) + len(val) == 447
    assert len(val) / 447 == pytest.approx(0.25, abs=0.02)
    assert len(labeled) == 16
    assert set(labeled) <= set(train)
    assert [sample.name for sample in unlabeled] == [sample.name for sample in train]
    blocks = [
        {((row - 150) // 192, column // 192) for row, column in map(position, part)} for part in (train, val)
    ]
    assert blocks[0].isdisjoint(blocks[1])


def test_every_class_is_in_every_part(root):
    classes = read_classes("classes.txt", root)
    assert classes == ["ocean", "tropical", "arid", "temperate", "continental", "polar"]
    for name in ("all", "val", "labeled"):
        pixels = check_masks(read_list(f"splits/{name}.txt", root), Labels(len(classes))).sum(0)
        assert (pixels / pixels.sum()).min() > 0.05, name


def test_tags_are_of_the_training_tiles(root):
    classes = read_classes("classes.txt", root)
    tags = read_tags("tags.csv", classes, root)
    train = read_list("splits/all.txt", root)
    assert set(tags) == {sample.name for sample in train}
    for sample in train[:20]:
        ids, counts = np.unique(np.array(Image.open(sample.mask)), return_counts=True)
        shown = {classes[index] for index, count in zip(ids, counts, strict=True) if count >= 0.02 * 96 * 96}
        assert {classes[index] for index in tags[sample.name]} == shown


def test_pictures_lie_on_their_masks(root):
    """The sea is the bluest and the ice the brightest of the six, which a shifted or flipped map would not show."""
    blue, bright = np.zeros(6), np.zeros(6)
    pixels = np.zeros(6)
    for sample in read_list("splits/val.txt", root):
        image, mask = np.asarray(Image.open(sample.image), float), np.asarray(Image.open(sample.mask))
        assert image.shape == (96, 96, 3)
        pixels += np.bincount(mask.ravel(), minlength=6)
        blue += np.bincount(mask.ravel(), (image[..., 2] - image[..., 0]).ravel(), minlength=6)
        bright += np.bincount(mask.ravel(), image.mean(axis=2).ravel(), minlength=6)
    assert np.argmax(blue / pixels) == 0
    assert np.argmax(bright / pixels) == 5


def test_many_callers_share_one_copy(tmp_path, monkeypatch):
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        roots = list(pool.map(lambda _: unpack(), range(4)))
    assert len(set(roots)) == 1
    assert [path for path in (tmp_path / "data").iterdir() if path.is_dir()] == [roots[0]]


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    root = unpack()
    assert (root / "classes.txt").is_file()
    assert root.is_relative_to(tmp_path)
