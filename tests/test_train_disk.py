"""A full disk, a folder that cannot be written, a second run in the folder: a clear end, and nothing lost."""

import ctypes
import os
import resource

import killing
import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pseudoseg_fast import checkpoint, train
from pseudoseg_fast.run_folder import held
from pseudoseg_fast.trainer import Trainer

CHANGES = {"optim.steps": 4, "run.checkpoint_every": 2, "run.log_every": 1, "method.name": "supervised"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.make_set(tmp_path_factory.mktemp("set") / "pictures")


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def before_step(monkeypatch, step, action):
    """Do ``action`` when ``step`` is about to be taken, counted from 1."""
    take = Trainer.training_step

    def wrapper(trainer, *arguments):
        if trainer.step + 1 == step:
            action()
        return take(trainer, *arguments)

    monkeypatch.setattr(Trainer, "training_step", wrapper)


def whole_files(folder):
    """What is in the run's checkpoints; nothing half written may be there."""
    paths = list((folder / "checkpoints").iterdir())
    return {path.name: checkpoint.load(path)["step"] for path in paths}


def test_a_full_disk_ends_the_run_with_its_checkpoints_intact(root, folder, monkeypatch, capsys):
    options = tiny.options(root, folder, CHANGES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        largest = (folder / "checkpoints" / "last.ckpt").stat().st_size // 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))

    try:
        with monkeypatch.context() as patch:
            before_step(patch, 3, fill)
            assert train.main(options) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = capsys.readouterr().err.splitlines()[-1]
    assert "File too large; nothing that was there before is lost" in message
    assert str(folder / "checkpoints") in message
    assert whole_files(folder) == {"last.ckpt": 2, "step-2.ckpt": 2}
    assert train.main([*options, "--run.resume=auto"]) == 0
    assert whole_files(folder) == {"last.ckpt": 4, "step-4.ckpt": 4, "step-2.ckpt": 2, "best.ckpt": 4}


def without_privileges(action):
    """Call ``action`` where permissions count for root, too: without its capabilities."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()):
        raise OSError(ctypes.get_errno(), "capset")
    return action()


def run_without_privileges(tmp_path, options):
    """The status of a training run for which permissions count, and what it prints."""
    output = tmp_path / "output.txt"
    status = killing.wait(killing.fork(lambda: without_privileges(lambda: train.main(options)), output))
    return status, output.read_text()


def test_a_folder_that_cannot_be_written_is_named_before_the_first_step(root, tmp_path):
    (tmp_path / "shelf").mkdir()
    (tmp_path / "shelf").chmod(0o555)
    folder = tmp_path / "shelf" / "run"
    status, printed = run_without_privileges(tmp_path, tiny.options(root, folder, CHANGES))
    assert status == 2
    message = printed.splitlines()[-1]
    assert message.startswith(
        "python -m pseudoseg_fast.train: error: [Errno 13] Permission denied; expected a folder"
    )
    assert message.endswith(f"choose another --run.dir: '{folder}'")
    assert "step/s" not in printed


def test_a_folder_that_becomes_read_only_keeps_its_checkpoints(root, tmp_path, folder, monkeypatch):
    before_step(monkeypatch, 3, lambda: (folder / "checkpoints").chmod(0o555))
    status, printed = run_without_privileges(tmp_path, tiny.options(root, folder, CHANGES))
    assert status == 2
    message = printed.splitlines()[-1]
    assert "Permission denied; nothing that was there before is lost" in message
    assert str(folder / "checkpoints") in message
    assert whole_files(folder) == {"last.ckpt": 2, "step-2.ckpt": 2}


def test_a_second_run_in_a_folder_is_refused(root, tmp_path, folder, capsys):
    assert train.main(tiny.options(root, folder, CHANGES | {"optim.steps": 1})) == 0
    files = {
        path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file() and path.name != ".lock"
    }
    ready = os.pipe()

    def hold():
        with held(folder):
            os.write(ready[1], b"!")
            os.read(os.pipe()[0], 1)
        return 0

    holder = killing.fork(hold, tmp_path / "output.txt")
    os.read(ready[0], 1)
    try:
        for option in ("--run.resume=auto", "--run.overwrite=true"):
            assert train.main([*tiny.options(root, folder, CHANGES | {"optim.steps": 1}), option]) == 2
            assert f"{folder} is in use by process {holder} on " in capsys.readouterr().err
    finally:
        killing.kill(holder)
    assert {path: path.read_bytes() for path in files} == files


def test_tensorboard_has_all_steps_up_to_the_checkpoint_of_a_killed_run(root, tmp_path, folder, monkeypatch):
    before_step(monkeypatch, 4, lambda: os.kill(os.getpid(), 9))
    options = tiny.options(root, folder, CHANGES)
    assert killing.wait(killing.fork(lambda: train.main(options), tmp_path / "output.txt")) == -9
    events = EventAccumulator(str(folder / "log"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/L_s")][:2] == [1, 2]
