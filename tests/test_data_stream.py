"""Pictures in tar shards that can only be read from their beginning: pipes stand in for URLs."""

import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import tiny
from PIL import Image
from torch.utils.data import DataLoader

from pseudoseg_fast import train
from pseudoseg_fast.config import DataConfig, parse_config
from pseudoseg_fast.data.dataset import SegmentationDataset, collate
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import DataError
from pseudoseg_fast.data.pool import read_unlabeled
from pseudoseg_fast.data.shards import shard_name
from pseudoseg_fast.data.stream import Stream, StreamDataset
from pseudoseg_fast.loaders import unlabeled_loader
from pseudoseg_fast.trainer import Trainer

SHARDS, INSIDE = 6, 4


def write_shard(path, files):
    with tarfile.open(path, "w") as shard:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))


def encoded(number):
    data = io.BytesIO()
    Image.new("RGB", (5, 4), (number, 0, 0)).save(data, "PNG")
    return data.getvalue()


@pytest.fixture
def url(tmp_path):
    for shard in range(SHARDS):
        numbers = range(shard * INSIDE, (shard + 1) * INSIDE)
        files = {f"{number}.png": encoded(number) for number in numbers} | {f"{shard}.json": b"{}"}
        write_shard(tmp_path / f"pool-{shard:02d}.tar", files)
    return f"pipe:cat {tmp_path}/pool-{{00..{SHARDS - 1:02d}}}.tar"


def pictures(url, size=SHARDS * INSIDE):
    return SegmentationDataset(read_unlabeled(url, ".", size=size), Labels(1))


def first(dataset, count, workers=0):
    """The values of the first pictures, in batches of two."""
    loader = DataLoader(dataset, 2, num_workers=workers, collate_fn=collate)
    batches = itertools.islice(loader, count // 2)
    return [int(value) for batch in batches for value in batch["image"][:, 0, 0, 0]]


def test_a_pass_shows_each_picture_once(url):
    values = first(StreamDataset(pictures(url), 7, shuffled=2), SHARDS * INSIDE - 2)
    assert len(set(values)) == len(values)
    assert values != sorted(values)
    assert first(StreamDataset(pictures(url), 7, shuffled=2), len(values)) == values
    assert first(StreamDataset(pictures(url), 8, shuffled=2), len(values)) != values


def test_ranks_and_workers_see_other_pictures(url):
    seen = [first(StreamDataset(pictures(url), 7, rank, 3, shuffled=2), 4) for rank in range(3)]
    assert len({value for values in seen for value in values}) == 12
    values = first(StreamDataset(pictures(url), 7, shuffled=2), 12, workers=2)
    assert len(set(values)) == 12


def test_names_and_seeds(url):
    item = next(iter(StreamDataset(pictures(url), 0)))
    number = item["image"][0, 0, 0].item()
    assert item["name"] == f"pool-{number // INSIDE:02d}.tar/{number}.png"
    assert item["corrupt"] == ()


def test_members_keep_their_names_and_hidden_ones_are_left_out(tmp_path):
    names = ("./a/IMG_0.v1.PNG", "IMG_0.JSON", "._IMG_0.PNG")
    write_shard(tmp_path / "a.tar", {name: encoded(3) for name in names})
    items = itertools.islice(StreamDataset(pictures(f"pipe:cat {tmp_path}/a.tar"), 0), 3)
    assert {item["name"] for item in items} == {"a.tar/a/IMG_0.v1.PNG"}


def test_masks_beside_pictures_are_left_out(tmp_path, caplog):
    names = ("0.png", "0.json", "0.seg.png", "1.png", "1.seg.png")
    write_shard(tmp_path / "a.tar", {name: encoded(3) for name in names})
    url = f"pipe:cat {tmp_path}/a.tar"
    items = itertools.islice(StreamDataset(pictures(url), 0, shuffled=2), 9)
    assert {item["name"] for item in items} == {"a.tar/0.png", "a.tar/1.png"}
    assert [record.getMessage() for record in caplog.records] == [
        f"2 members of {url} are left out, such as 0.seg.png: each lies behind a picture of its name, as a mask does"
    ]


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/pool-07.tar",
        "https://host/set/pool-07.tar?sign=a/b.tar#c",
        "https://host/get?id=3&name=/set/pool-07.tar&sign=x",
        "pipe:aws s3 cp s3://bucket/pool-07.tar -",
        "pipe:cat /data/pool-07.tar | cat",
        "pipe:curl -s 'https://host/pool-07.tar?sign=x' | tee /tmp/other.tar",
        "pipe:ssh host cat pool-07.tar",
        "pipe:cat <(ssh host:pool-07.tar)",
        "https://host/get?file=pool-07.tar&t=1",
        "pipe:aws s3api get-object --key=pool-07.tar /dev/stdout",
        "pipe:dd if=/data/pool-07.tar bs=1M",
        "pipe:curl https://host.tar.com/pool-07.tar",
        "pipe:ssh files.tar cat pool-07.tar",
    ],
)
def test_shards_are_named_as_on_a_disk(url):
    assert shard_name(url) == "pool-07.tar"


def test_shards_of_other_names():
    assert shard_name("pipe:zcat /data/pool-07.tar.gz -") == "pool-07.tar.gz"
    assert shard_name("s3://bucket/part=7 b.tar") == "part=7 b.tar"
    assert shard_name("s3://my.tar.bucket/pool") == "pool"
    assert shard_name("https://host/shards/7?sign=x") == "7"
    assert shard_name("pipe:./make 7") == "make 7"


def warnings(tmp_path, caplog, tagged):
    """What is said about a stream of two shards that is gone through twice."""
    for shard in (0, 1):
        write_shard(tmp_path / f"{shard}.tar", {f"./{number}.png": encoded(number) for number in range(3)})
    url = f"pipe:cat {tmp_path}/{{0..1}}.tar | cat"
    caplog.clear()
    list(itertools.islice(StreamDataset(pictures(url), 0, shuffled=2, tagged=tagged), 12))
    return [record.getMessage() for record in caplog.records]


def test_tags_of_no_picture_of_a_stream_are_named_once(tmp_path, caplog):
    (text,) = warnings(tmp_path, caplog, ["0.tar/images/2.png", "1.tar/images/2.png"])
    assert "has a name that data.tags has: its names must be those of the stream, such as" in text
    assert text.endswith((".tar/0.png, got 0.tar/images/2.png", ".tar/0.png, got 1.tar/images/2.png"))
    for tagged in ([], ["0.tar/2.png"], ["2.tar/9.png"]):
        expected = warnings(tmp_path, caplog, [*tagged, "1.tar/1.png"])
        assert not expected, tagged
    assert not warnings(tmp_path, caplog, [])


def test_unreadable_pictures_are_skipped_and_named(tmp_path):
    write_shard(tmp_path / "a.tar", {"bad.png": b"no picture", "good.png": encoded(3)})
    items = itertools.islice(StreamDataset(pictures(f"pipe:cat {tmp_path}/a.tar"), 0), 6)
    assert {name for item in items for name in item["corrupt"]} == {"a.tar/bad.png"}


@pytest.mark.parametrize(
    ("files", "match"),
    [
        pytest.param({"bad.png": b"no picture"}, "no readable picture in 33 of a stream", id="unreadable"),
        pytest.param({"a.txt": b""}, "hold no picture", id="no-picture"),
        pytest.param(None, "cannot be streamed", id="missing"),
    ],
)
def test_wrong_streams(tmp_path, files, match):
    if files is not None:
        write_shard(tmp_path / "a.tar", files)
    with pytest.raises(DataError, match=match):
        next(iter(StreamDataset(pictures(f"pipe:cat {tmp_path}/a.tar"), 0)))


def test_a_run_on_a_stream(url, tmp_path):
    source = tiny.make_set(tmp_path / "set")
    tiny.write(
        source / "tags.csv", ["image,tags", *(f"pool-00.tar/{number}.png,disc" for number in range(4))]
    )
    changes = {
        "data.unlabeled": url,
        "data.unlabeled_size": SHARDS * INSIDE,
        "data.tags": "tags.csv",
        "method.image_labels": "true",
    }
    config = parse_config(tiny.options(source, tmp_path / "run", changes), "", "")
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.data.pictures == SHARDS * INSIDE + 2
    names = [
        [next(batches)["name"] for _ in range(3)]
        for batches in (
            iter(unlabeled_loader(config, trainer.data, trainer.network, start, rank, 2))
            for start, rank in ((0, 0), (0, 1), (5, 0), (0, 0))
        )
    ]
    assert names[0] == names[3]
    assert names[0] != names[1]
    assert names[0] != names[2]
    batch = next(iter(unlabeled_loader(config, trainer.data, trainer.network, 0)))
    assert unlabeled_loader(config, trainer.data, trainer.network, 0).dataset.tagged is trainer.data.tags
    for name, tags in zip(batch["name"], batch["tags"], strict=True):
        assert tags.isnan().all() == (not name.startswith("pool-00"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_teaches(url, tmp_path, workers):
    source = tiny.make_set(tmp_path / "set")
    changes = {
        "data.unlabeled": url,
        "data.unlabeled_size": SHARDS * INSIDE,
        "data.workers": workers,
        "optim.accumulate": 2,
        "run.log_every": 1,
    }
    assert train.main(tiny.options(source, tmp_path / "run", changes)) == 0
    losses = [row["L_u"] for row in tiny.log(tmp_path / "run") if "L_u" in row]
    assert len(losses) == 3
    assert all(loss > 0 for loss in losses)


def test_a_stop_that_reaches_what_a_worker_reads_from_too_is_saved(url, tmp_path):
    source = tiny.make_set(tmp_path / "set")
    changes = {
        "data.unlabeled": url.replace("pipe:", "pipe:sleep 2; "),  # which a signal finds asleep
        "data.unlabeled_size": SHARDS * INSIDE,
        "data.workers": 1,
        "run.log_every": 1,
        "optim.steps": 10_000,
    }
    program = "import functools, sys; from pseudoseg_fast import loaders, train; "
    program += "loaders.StreamDataset = functools.partial(loaders.StreamDataset, shuffled=2); "
    program += "sys.exit(train.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", program, *tiny.options(source, tmp_path / "run", changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    printed = ""
    try:
        while "step     2/" not in printed:
            line = process.stdout.readline()
            assert line, printed
            printed += line
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGTERM)  # as schedulers do
        printed += process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, printed
    assert tiny.checkpoint(tmp_path / "run")["step"] >= 2


def test_what_a_stream_cannot(url, monkeypatch):
    with pytest.raises(DataError, match=r"stream of unknown length; .* --data.unlabeled_size N"):
        read_unlabeled(url, ".")
    with pytest.raises(DataError, match="is a stream, in which no picture has a place"):
        Stream(["s3://a.tar"], 3)[0]
    with pytest.raises(ValueError, match="unlabeled_size must be positive, got 0"):
        DataConfig("demo", unlabeled_size=0)
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(DataError, match=r"pip install 'pseudoseg-fast\[webdataset\]'"):
        StreamDataset(pictures(url), 0)
