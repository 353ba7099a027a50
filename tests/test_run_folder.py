"""The folder of a run: who may use it, and with what a run in it goes on."""

import os
import re
import signal
import socket
import time

import killing
import pytest
import torch

from pseudoseg_fast import checkpoint
from pseudoseg_fast.config import parse_config
from pseudoseg_fast.kept import go_back, save_last
from pseudoseg_fast.run_folder import held, is_restart, run_folder


def config(folder, *options):
    where = [] if folder is None else [f"--run.dir={folder}"]
    return parse_config(["--data.root=R", *where, *options], "train", "")


@pytest.fixture
def folder(tmp_path):
    """A folder with a run that has come to step 2."""
    folder = tmp_path / "run"
    for step in (1, 2):
        save_last(folder / "checkpoints", {"step": step, "w": torch.zeros(3)}, keep=2)
    (folder / "config.yaml").touch()
    return folder


def taken(*arguments):
    return [path.name for path in run_folder(config(*arguments), restart=is_restart())[1]]


NEWEST = ["last.ckpt", "step-2.ckpt", "step-1.ckpt"]


@pytest.mark.parametrize("made", [None, "folder", "run"])
def test_auto_begins_a_run_where_there_is_none(tmp_path, made):
    if made:
        (tmp_path / "run").mkdir()
    if made == "run":  # that never came to a checkpoint
        for name in ("run.json", "config.yaml"):
            (tmp_path / "run" / name).touch()
    assert run_folder(config(tmp_path / "run", "--run.resume=auto")) == (tmp_path / "run", [])


@pytest.mark.parametrize("options", [[], ["--run.resume=auto"]])
def test_a_configuration_that_no_run_wrote_is_not_replaced(tmp_path, options):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ValueError, match=r"config\.yaml without the run\.json that a run writes"):
        run_folder(config(tmp_path, *options))
    assert run_folder(config(tmp_path, *options, "--run.overwrite=true")) == (tmp_path, [])


def test_auto_goes_on_with_the_newest(folder):
    assert taken(folder, "--run.resume=auto") == NEWEST
    assert taken(folder, "--run.resume=auto", "--run.overwrite=true") == NEWEST


def test_a_path_is_of_a_checkpoint_or_of_a_run(folder, tmp_path):
    step = folder / "checkpoints" / "step-1.ckpt"
    for run in (folder, tmp_path / "new"):
        assert taken(run, f"--run.resume={step}") == ["step-1.ckpt"]
        assert taken(run, f"--run.resume={folder}") == NEWEST
    with pytest.raises(ValueError, match=rf"or its folder, found none {re.escape(str(tmp_path))}"):
        run_folder(config(tmp_path / "new", f"--run.resume={tmp_path}"))


def test_a_run_whose_last_checkpoint_was_taken_away_is_a_run(folder):
    (folder / "config.yaml").unlink()
    (folder / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        run_folder(config(folder))


class TestUnderTorchrunWithRestarts:
    @pytest.fixture(autouse=True)
    def _torchrun(self, monkeypatch):
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")

    def test_the_same_command_begins_and_goes_on(self, folder, tmp_path):
        assert taken(tmp_path / "new") == []
        assert taken(folder) == NEWEST

    def test_a_run_that_began_from_another_goes_on_from_its_own(self, folder, tmp_path, monkeypatch):
        new, path = tmp_path / "new", folder / "checkpoints" / "step-1.ckpt"
        assert taken(new, f"--run.resume={path}") == ["step-1.ckpt"]
        new.mkdir()
        for name in ("run.json", "config.yaml"):
            (new / name).touch()
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert taken(new, f"--run.resume={path}") == ["step-1.ckpt"]  # it had not come to a checkpoint
        save_last(new / "checkpoints", {"step": 7}, keep=1)
        assert taken(new, f"--run.resume={path}") == ["last.ckpt", "step-7.ckpt"]

    def test_a_run_goes_back_once(self, folder, monkeypatch):
        path = folder / "checkpoints" / "step-1.ckpt"
        assert taken(folder, f"--run.resume={path}") == ["step-1.ckpt"]
        go_back(folder / "checkpoints", path, 1)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert taken(folder, f"--run.resume={path}") == ["last.ckpt", "step-1.ckpt"]
        assert checkpoint.load(folder / "checkpoints" / "last.ckpt")["step"] == 1
        save_last(folder / "checkpoints", {"step": 2}, keep=2)
        assert taken(folder, f"--run.resume={path}") == NEWEST

    def test_another_runs_checkpoint_does_not_replace_a_run_at_the_first_start(self, folder, tmp_path):
        save_last(tmp_path / "new" / "checkpoints", {"step": 7}, keep=1)
        with pytest.raises(ValueError, match=r"already holds a run; go on with it: --run\.resume auto"):
            taken(tmp_path / "new", f"--run.resume={folder / 'checkpoints' / 'step-1.ckpt'}")

    def test_what_could_not_go_on_is_refused_at_once(self, folder):
        with pytest.raises(ValueError, match=r"--max-restarts needs to know the run: give --run.dir"):
            run_folder(config(None))
        with pytest.raises(ValueError, match=r"a restart would delete the run"):
            run_folder(config(folder, "--run.overwrite=true"))


def test_without_restarts_torchrun_changes_nothing(folder, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    with pytest.raises(ValueError, match="already holds a run"):
        run_folder(config(folder))


def hold_with_a_child(folder):
    """Hold a folder for long, with a child, as data workers are, that outlives its parent."""
    with held(folder):
        if not os.fork():
            signal.alarm(60)  # should the test fail
            (folder / "child").write_text(str(os.getpid()))
            signal.pause()
        time.sleep(100)


def test_a_folder_in_use_is_refused_until_its_holder_dies(tmp_path):
    folder = tmp_path / "run"
    holder = killing.fork(lambda: hold_with_a_child(folder), tmp_path / "output.txt")
    try:
        end = time.monotonic() + 30
        while not ((folder / "child").exists() and (folder / "child").read_text()):
            assert time.monotonic() < end, (tmp_path / "output.txt").read_text()
            time.sleep(0.01)
        expected = f"{folder} is in use by process {holder} on {socket.gethostname()}, since 2"
        for _ in range(2):
            with pytest.raises(
                ValueError, match=f"^{re.escape(expected)}.*; wait for its end, or choose another"
            ):
                held(folder).__enter__()
    finally:
        killing.kill(holder)
    with held(folder):
        assert f"process {os.getpid()} on " in (folder / ".lock").read_text()
        os.kill(int((folder / "child").read_text()), 0)  # the child is still there
    os.kill(int((folder / "child").read_text()), signal.SIGKILL)
