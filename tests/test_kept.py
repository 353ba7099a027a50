"""Which checkpoints are kept, and which one is taken; whatever happens in between."""

import errno
import os
import shutil
import signal

import killing
import pytest
import torch

from pseudoseg_fast import checkpoint
from pseudoseg_fast.kept import load_first_whole, newest_first, save_last, steps_in


def state(step):
    return {"step": step, "model": {"weight": torch.full((100,), step)}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_last_few_are_kept_and_the_best(tmp_path):
    checkpoint.save(tmp_path / "best.ckpt", state(1))
    for step in (8, 9, 10, 11):
        save_last(tmp_path, state(step), keep=3)
    assert names(tmp_path) == ["best.ckpt", "last.ckpt", "step-10.ckpt", "step-11.ckpt", "step-9.ckpt"]
    assert [path.name for path in newest_first(tmp_path)] == [
        *("last.ckpt", "step-11.ckpt", "step-10.ckpt", "step-9.ckpt", "best.ckpt")
    ]
    assert [checkpoint.load(path)["step"] for path in newest_first(tmp_path)] == [11, 11, 10, 9, 1]
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "step-11.ckpt")
    save_last(tmp_path, state(12), keep=1)
    assert names(tmp_path) == ["best.ckpt", "last.ckpt", "step-12.ckpt"]


def test_a_step_can_be_saved_again(tmp_path):
    save_last(tmp_path, state(5), keep=2)
    save_last(tmp_path, state(5) | {"again": True}, keep=2)
    assert names(tmp_path) == ["last.ckpt", "step-5.ckpt"]
    assert all(checkpoint.load(path)["again"] for path in newest_first(tmp_path))


def test_a_run_that_went_back_leaves_no_checkpoint_of_its_other_course(tmp_path):
    for step in (2, 4, 6):
        save_last(tmp_path, state(step), keep=3)
    save_last(tmp_path, state(3), keep=3)
    assert names(tmp_path) == ["last.ckpt", "step-2.ckpt", "step-3.ckpt"]
    assert checkpoint.load(tmp_path / "last.ckpt")["step"] == 3


def test_files_of_others_are_left_alone(tmp_path):
    for name in ("step-.ckpt", "step-x.ckpt", "step-1.pth", "notes.ckpt"):
        (tmp_path / name).write_text("mine")
    save_last(tmp_path, state(2), keep=1)
    assert len(names(tmp_path)) == 6
    assert list(steps_in(tmp_path)) == [2]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_without_hard_links_the_last_is_a_copy(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    for step in (1, 2):
        save_last(tmp_path, state(step), keep=1)
    assert names(tmp_path) == ["last.ckpt", "step-2.ckpt"]
    assert not (tmp_path / "last.ckpt").samefile(tmp_path / "step-2.ckpt")
    assert checkpoint.load(tmp_path / "last.ckpt")["step"] == 2


def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path, caplog):
    for step in (1, 2):
        save_last(tmp_path, state(step), keep=2)
    (tmp_path / "step-2.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-100])  # and so last.ckpt
    path, found = load_first_whole(newest_first(tmp_path))
    assert path.name == "step-1.ckpt"
    assert found["step"] == 1
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first.startswith(f"{tmp_path / 'last.ckpt'} cannot be read as a checkpoint, it is damaged")
    assert second.startswith(f"{tmp_path / 'step-2.ckpt'} cannot be read as a checkpoint, it is damaged")
    assert third == f"going on with {path}, of step 1, instead"


def test_where_no_checkpoint_is_whole_all_reasons_are_given(tmp_path):
    save_last(tmp_path, state(1), keep=1)
    torch.save({"theirs": 1}, tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").write_text("hello")
    with pytest.raises(
        ValueError, match=r"last.ckpt cannot(.|\n)*step-1.ckpt cannot(.|\n)*best.ckpt is not a checkpoint"
    ):
        load_first_whole(newest_first(tmp_path))


def test_a_kill_at_any_operation_of_a_save_leaves_a_whole_last_checkpoint(tmp_path):
    """The child dies before its first operation on a file, before its second, and so on, until it has none left."""

    def save_and_die_at(operation, folder):
        left = iter(range(operation))

        def dying(function):
            def wrapper(*arguments, **options):
                if next(left, None) is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return wrapper

        for name in ("open", "fsync", "link", "replace", "unlink"):
            setattr(os, name, dying(getattr(os, name)))
        checkpoint._Summed.write = dying(checkpoint._Summed.write)
        save_last(folder, state(3), keep=2)
        return 0

    for step in (1, 2):
        save_last(tmp_path / "before", state(step), keep=2)
    reached = []
    for operation in range(100):
        folder = tmp_path / str(operation)
        shutil.copytree(tmp_path / "before", folder)
        process = killing.fork(lambda n=operation, f=folder: save_and_die_at(n, f), tmp_path / "output.txt")
        status = killing.wait(process)
        assert status in (0, -signal.SIGKILL), (tmp_path / "output.txt").read_text()
        found = [checkpoint.load(path)["step"] for path in newest_first(folder)]
        assert found[0] in (2, 3)
        assert 2 in found
        reached.append(found[0])
        if status == 0:
            break
    assert reached[0] == 2
    assert reached[-1] == 3
    assert reached == sorted(reached)
    assert len(reached) > 15
    for operation in (len(reached) // 3, len(reached) - 2):  # a run that goes on clears up
        folder = tmp_path / str(operation)
        save_last(folder, state(3), keep=2)
        assert names(folder) == ["last.ckpt", "step-2.ckpt", "step-3.ckpt"]
