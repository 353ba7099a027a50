import os
import pickle
import resource
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


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, STATE)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"last.ckpt cannot be read as a checkpoint, it is damaged"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("content", "found"), [({"state_dict": {}}, "None"), ({"format": "x"}, "'x'"), ([1], "list")]
)
def test_another_programs_file_is_refused(tmp_path, content, found):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"no checkpoint of this program.*found .*{found}"):
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
