import hashlib
import os
import pickle
import resource
import zipfile
from contextlib import contextmanager

import pytest
import torch

from pseudoseg_fast import checkpoint

STATE = {"step": 3, "model": {"weight": torch.arange(300.0)}, "names": ["a", "b"], "best": None}


@contextmanager
def largest_file(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Touch:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    checkpoint.save(path, STATE)
    checkpoint.save(path, STATE | {"step": 4})
    loaded = checkpoint.load(path)
    assert loaded.pop("format") == checkpoint.FORMAT
    assert torch.equal(loaded["model"].pop("weight"), STATE["model"]["weight"])
    assert loaded == {"step": 4, "model": {}, "names": ["a", "b"], "best": None}
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_a_checkpoint_has_the_permissions_of_other_new_files(tmp_path):
    checkpoint.save(tmp_path / "last.ckpt", STATE)
    (tmp_path / "other").touch()
    assert (tmp_path / "last.ckpt").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("size", [0, 1000, 2000], ids=["first write", "in the tensors", "at the end"])
def test_a_full_disk_leaves_the_former_file(tmp_path, size):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, STATE)
    assert path.stat().st_size > 2000
    with pytest.raises(OSError, match="File too large"), largest_file(size):
        checkpoint.save(path, STATE | {"step": 4})
    assert checkpoint.load(path)["step"] == 3
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
def test_a_failure_after_writing_leaves_the_former_file(tmp_path, monkeypatch, function):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, STATE)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(function, fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, STATE | {"step": 4})
    assert checkpoint.load(path)["step"] == 3
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"RUN/checkpoints/best.ckpt, found no file .*none.ckpt"):
        checkpoint.load(tmp_path / "none.ckpt")


DAMAGED = r"last.ckpt cannot be read as a checkpoint, it is damaged or of another kind: "


@pytest.fixture
def whole(tmp_path):
    """The bytes of a checkpoint and where it lies."""
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, STATE)
    return path.read_bytes(), path


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(whole, share):
    content, path = whole
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=DAMAGED):
        checkpoint.load(path)


def test_a_file_is_refused_wherever_it_is_cut(whole):
    content, path = whole
    with path.open("r+b") as file:
        for size in reversed(range(len(content))):
            file.truncate(size)
            with pytest.raises(ValueError, match=DAMAGED):
                checkpoint.load(path)


def test_a_flipped_bit_is_noticed_wherever_it_is(whole):
    content, path = whole
    checkpoint.load(path)
    with path.open("r+b", buffering=0) as file:
        for index, byte in enumerate(content):
            file.seek(index)
            file.write(bytes([byte ^ 1 << index % 8]))
            with pytest.raises(ValueError, match=DAMAGED):
                checkpoint.load(path)
            file.seek(index)
            file.write(bytes([byte]))
    checkpoint.load(path)


@pytest.mark.parametrize("more", [b"\0", b"x" * 100])
def test_a_file_with_more_at_its_end_is_refused(whole, more):
    content, path = whole
    path.write_bytes(content + more)
    with pytest.raises(ValueError, match=DAMAGED):
        checkpoint.load(path)


def test_a_checkpoint_written_by_other_means_is_refused(whole):
    state = torch.load(whole[1], weights_only=True)
    torch.save(state, whole[1])
    with pytest.raises(ValueError, match=DAMAGED + "there is no checksum at its end"):
        checkpoint.load(whole[1])


def test_torch_and_zip_read_a_checkpoint_as_any_other(whole):
    assert torch.equal(torch.load(whole[1], weights_only=True)["model"]["weight"], STATE["model"]["weight"])
    mapped = torch.load(whole[1], weights_only=True, mmap=True)
    assert torch.equal(mapped["model"]["weight"], STATE["model"]["weight"])
    with zipfile.ZipFile(whole[1]) as archive:
        assert archive.testzip() is None
        archived = (
            whole[0].removesuffix(len(archive.comment).to_bytes(2, "little") + archive.comment) + b"\0\0"
        )
        assert archive.comment.decode() == f"sha256={hashlib.sha256(archived).hexdigest()}"


@pytest.mark.parametrize(
    ("content", "found"), [({"state_dict": {}}, "None"), ({"format": "x"}, "'x'"), ([1], "list")]
)
def test_another_programs_file_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"not a checkpoint of this program.*found .*{found}"):
        checkpoint.load(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["pickle", "torch zip"])
def test_loading_runs_no_code(tmp_path, kind):
    proof = tmp_path / "executed"
    path = tmp_path / "evil.ckpt"
    evil = {"format": checkpoint.FORMAT, "model": Touch(proof)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
        pickle.loads(path.read_bytes())["model"].close()
    else:
        torch.save(evil, path)
        torch.load(path, weights_only=False)["model"].close()
    assert proof.exists()  # so the file does what it is said to do
    proof.unlink()
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        checkpoint.load(path)
    assert not proof.exists()
