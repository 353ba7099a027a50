"""Pictures in tar files."""

import gzip
import io
import tarfile

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pseudoseg_fast.config import parse_config
from pseudoseg_fast.data.dataset import SegmentationDataset, collate
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import DataError
from pseudoseg_fast.data.pool import read_unlabeled
from pseudoseg_fast.data.sampler import StepSampler
from pseudoseg_fast.loaders import unlabeled_loader
from pseudoseg_fast.trainer import Trainer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PSEUDOSEG_CACHE", str(tmp_path / "cache"))


def encoded(number, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), (number, 0, 0)).save(stream, kind)
    return stream.getvalue()


def write_shard(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


@pytest.fixture
def root(tmp_path):
    long = "deep/" + "x" * 120 + " ü.png"  # longer than a plain head holds
    write_shard(
        tmp_path / "shards/pool-00.tar",
        {"0.png": encoded(0), "0.json": b"{}", long: encoded(1), "2.TIFF": encoded(2, "TIFF")}
        | dict.fromkeys(("._0.png", "__MACOSX/._0.png", ".hidden/0.png"), b"resource fork"),
    )
    write_shard(tmp_path / "shards/pool-01.tar", {f"{number}.png": encoded(number) for number in (3, 4)})
    return tmp_path


def batches(samples, workers=0, start=0, rank=0, ranks=1):
    dataset = SegmentationDataset(samples, Labels(1))
    sampler = StepSampler(len(dataset), 2, 1, steps=10, start_step=start, rank=rank, world_size=ranks)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate)
    return [batch["image"][:, 0, 0, 0].tolist() for batch in loader]


@pytest.mark.parametrize("text", ["shards/pool-{00..01}.tar", "shards/pool-*.tar", "shards/pool-0[01].tar"])
def test_members_are_read_by_themselves(root, text):
    samples = read_unlabeled(text, root)
    assert len(samples) == 5
    assert samples[0].name == "pool-00.tar/0.png"
    dataset = SegmentationDataset(samples, Labels(1))
    assert [dataset[index]["image"][0, 0, 0].item() for index in (4, 0, 2, 1, 3)] == [4, 0, 2, 1, 3]
    assert [sample.name for sample in samples[3:]] == ["pool-01.tar/3.png", "pool-01.tar/4.png"]
    assert list(samples)[1] == samples[1]


def test_members_of_a_packed_folder_are_named_as_those_of_others(root):
    """As ``tar -C folder -cf pool.tar .`` packs it."""
    files = {name: encoded(number) for number, name in enumerate(("./0.png", "./deep/../1.png", "/2.png"))}
    write_shard(root / "pool.tar", files | {"./._0.png": b"resource fork"})
    samples = read_unlabeled("pool.tar", root)
    assert [sample.name for sample in samples] == [f"pool.tar/{number}.png" for number in range(3)]
    dataset = SegmentationDataset(samples, Labels(1))
    assert [dataset[index]["image"][0, 0, 0].item() for index in range(3)] == [0, 1, 2]


def test_masks_beside_pictures_are_left_out(root, caplog):
    packed = ("0.png", "0.seg.png", "0.json", "a/0.jpg", "a/0.png", "00.png")
    alone = ("scan.001.png", "scan.002.png", "v1.0.png", "v1.1.png", "1.png", "10.png", "b/1.png")
    write_shard(root / "pool-0.tar", {name: encoded(3) for name in packed})
    write_shard(root / "pool-1.tar", {name: encoded(3) for name in alone})
    for _ in range(2):  # found out, and kept
        caplog.clear()
        samples = read_unlabeled("pool-*.tar", root)
        names = [f"pool-0.tar/{name}" for name in ("0.png", "a/0.jpg", "00.png")]
        assert [sample.name for sample in samples] == [*names, *(f"pool-1.tar/{name}" for name in alone)]
        assert (
            "2 members of pool-*.tar are left out, such as 0.seg.png: each lies behind a picture"
            in caplog.text
        )
    caplog.clear()
    assert len(read_unlabeled("pool-1.tar", root)) == len(alone)
    assert not caplog.records


@pytest.mark.parametrize(
    ("pictures", "masks"),
    [
        (["frame.jpg", "frame.0001.jpg", "frame.0002.jpg"], []),
        (["12.34.jpg", "12.34.5.jpg", "12.34.6.png"], []),
        (["IMG.jpg", "IMG.JPG", "IMG.crop.jpg"], []),
        (["../x.jpg", "y.jpg"], []),
        (["a.jpg", "a.frames/b.png"], []),
        (["7.jpg"], ["7.png"]),
        (["7.tif"], ["7.PNG", "7.depth.png"]),
        (["7.jpg"], ["7.seg.png", "7.mask_1.png", "7.labelIds.png", "7.gt.jpg"]),
        (["scan.1.png"], ["scan.1.mask.png"]),
    ],
)
def test_only_what_can_hardly_be_a_picture_is_left_out(root, pictures, masks, caplog):
    write_shard(root / "pool.tar", {name: encoded(3) for name in [*pictures, *masks]})
    assert list(read_unlabeled("pool.tar", root).names) == [f"pool.tar/{name}" for name in pictures]
    assert len(caplog.records) == bool(masks)


def test_steps_workers_and_ranks_see_what_they_see_of_single_files(root):
    samples = read_unlabeled("shards/pool-{00..01}.tar", root)
    for number, sample in enumerate(samples):
        (root / "single").mkdir(exist_ok=True)
        (root / "single" / f"{number}.png").write_bytes(sample.image.read_bytes())
    alone = batches(samples)
    assert batches(read_unlabeled("single", root)) == alone
    assert batches(samples, workers=2) == alone
    assert batches(samples, start=7) == alone[7:]
    ranks = [batches(samples, rank=rank, ranks=2) for rank in (0, 1)]
    assert [one for pair in zip(*ranks, strict=True) for one in pair][:10] == alone
    assert sorted(one for pair in alone[:5] for one in pair) == sorted([0, 1, 2, 3, 4] * 2)


def test_a_run_on_shards(root, tmp_path):
    source = tiny.make_set(tmp_path / "set")
    pictures = {f"{number}.png": (source / f"images/{number}.png").read_bytes() for number in range(4)}
    write_shard(source / "pool.tar", pictures)
    tiny.write(source / "tags.csv", ["image,tags", "pool.tar/1.png,disc"])
    changes = {"data.unlabeled": "pool.tar", "data.tags": "tags.csv", "method.image_labels": "true"}
    config = parse_config(tiny.options(source, tmp_path / "run", changes), "", "")
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.data.pictures == 6
    batch = next(iter(unlabeled_loader(config, trainer.data, trainer.network, 0)))
    assert all(name.startswith("pool.tar/") for name in batch["name"])


def test_an_unreadable_member_is_skipped(root):
    write_shard(root / "pool.tar", {"a.png": encoded(7), "b.png": b"no picture"})
    dataset = SegmentationDataset(read_unlabeled("pool.tar", root), Labels(1), on_corrupt="skip")
    item = dataset[1, 3]
    assert (item["corrupt"], item["name"]) == (("pool.tar/b.png",), "pool.tar/a.png")


def cut(path):
    path.write_bytes(path.read_bytes()[:700])


def compress(path):
    path.write_bytes(gzip.compress(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param(cut, "ends within 0.png: it was cut off|unexpected end of data", id="cut"),
        pytest.param(compress, "is not an uncompressed tar file", id="compressed"),
        pytest.param(lambda path: path.write_bytes(b""), "is not an uncompressed tar file", id="empty"),
        pytest.param(
            lambda path: path.write_bytes(bytes(np.arange(99))), "is not an uncompressed tar file", id="bytes"
        ),
        pytest.param(lambda path: path.unlink(), "1 shards .* are missing:\n.*pool-00.tar", id="missing"),
        pytest.param(lambda path: write_shard(path, {"a.txt": b""}), "holds no picture", id="no-picture"),
    ],
)
def test_wrong_shards(root, change, match):
    change(root / "shards/pool-00.tar")
    with pytest.raises(DataError, match=match):
        read_unlabeled("shards/pool-{00..00}.tar", root)


def test_a_shard_that_was_replaced(root):
    samples = read_unlabeled("shards/pool-00.tar", root)
    assert len(samples) == 3
    write_shard(root / "shards/pool-00.tar", {"9.png": encoded(9)})
    assert [sample.name for sample in read_unlabeled("shards/pool-00.tar", root)] == ["pool-00.tar/9.png"]
    (root / "shards/pool-00.tar").write_bytes(b"")
    with pytest.raises(DataError, match="ends within"):
        SegmentationDataset(samples, Labels(1))[1]


def test_tar_files_are_read_alike_by_forked_workers(root):
    samples = read_unlabeled("shards/pool-*.tar", root)
    samples[0].image.read_bytes()  # opened before the fork
    assert torch.tensor(batches(samples, workers=2)).equal(torch.tensor(batches(samples)))
