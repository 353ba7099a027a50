"""Stopping a run and going on: bitwise the run that never stopped."""

import functools
import json
import multiprocessing
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys

import killing
import pytest
import tiny
import torch
from same_runs import CHANGES, STEPS, assert_same, assert_same_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pseudoseg_fast import checkpoint, train, trainer
from pseudoseg_fast.report import render
from pseudoseg_fast.run_record import read_run
from pseudoseg_fast.scoring import Scores
from pseudoseg_fast.trainer import Trainer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.make_set(tmp_path_factory.mktemp("set") / "pictures")


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """A run of six steps in one go."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert train.main(tiny.options(root, folder, CHANGES)) == 0
    return folder


def during(monkeypatch, owner, name, call, action):
    """Do ``action`` before the ``call``-th call of a function, counted from 1."""
    function = getattr(owner, name)
    calls = []

    def wrapper(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            action()
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, wrapper)


def interrupt(number=signal.SIGINT):
    signal.raise_signal(number)


def leave():
    # A statement of its own, not a string given to exec: the interpreter takes an interrupt that
    # leaves such a string for one that nobody handled, and ends the whole of pytest by SIGINT.
    raise KeyboardInterrupt


def command_to_go_on(printed):
    """The arguments of the command that a stopped run prints."""
    program, arguments = re.search(r"to go on:\n +(python -m pseudoseg_fast.train) (.*)\n", printed).groups()
    assert program
    return shlex.split(arguments)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 4], ids=["between evaluations", "where an evaluation is due"])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    root, whole, tmp_path, monkeypatch, capfd, workers, stop
):
    folder = tmp_path / "a run"
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        during(patch, Trainer, "training_step", stop, interrupt)
        status = train.main(tiny.options(root, folder, CHANGES | {"data.workers": workers}))
    assert status == 130
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert tiny.checkpoint(folder)["step"] == stop
    assert not (folder / "result.json").exists()
    captured = capfd.readouterr()
    assert "stopping after this step" in captured.err
    assert f"stopped after step {stop} of {STEPS}, all of it saved" in captured.out

    assert train.main(command_to_go_on(captured.out)) == 0
    assert_same_runs(whole, folder)


def test_a_crashed_run_goes_on_from_its_last_checkpoint(root, whole, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    def crash():
        raise Crash

    folder = tmp_path / "run"
    options = tiny.options(root, folder, CHANGES | {"run.checkpoint_every": 3})
    with monkeypatch.context() as patch:
        during(patch, Trainer, "training_step", 6, crash)
        with pytest.raises(Crash):
            train.main(options)
    assert tiny.checkpoint(folder)["step"] == 3
    assert tiny.log(folder)[-1]["step"] == 5
    (events,) = (folder / "log").glob("events.*")
    events.rename(events.with_name("events.out.tfevents.0000000001"))  # readers go by the second in the name
    assert train.main([*options, "--run.resume=auto"]) == 0
    assert_same_runs(whole, folder)
    curves = EventAccumulator(str(folder / "log")).Reload()
    assert [event.step for event in curves.Scalars("train/lr")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in curves.Scalars("eval/mIoU")] == [2, 4, 6]


@pytest.mark.parametrize("place", ["evaluate", "save"])
def test_a_failed_evaluation_costs_nothing_but_itself(root, whole, tmp_path, monkeypatch, capsys, place):
    """Of the step that a checkpoint is due after, too: the run goes on with that evaluation."""

    def fail():
        raise RuntimeError("a val picture is gone")

    folder = tmp_path / "run"
    options = tiny.options(root, folder, CHANGES | {"run.checkpoint_every": 2})
    with monkeypatch.context() as patch:
        if place == "evaluate":
            during(patch, trainer, "evaluate", 2, fail)
        else:  # after the scores of step 4 have been logged
            during(patch, trainer, "save_last", 4, fail)
        assert train.main(options) == 2
    assert "a val picture is gone" in capsys.readouterr().err
    state = tiny.checkpoint(folder)
    assert (state["step"], state["scored"]) == (4, 2)
    assert train.main([*options, "--run.resume=auto"]) == 0
    assert_same_runs(whole, folder)


def flip_a_bit(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(root, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    options = tiny.options(root, folder, CHANGES | {"run.checkpoint_every": 3})
    assert train.main(options) == 0
    flip_a_bit(folder / "checkpoints" / "last.ckpt")
    assert train.main([*options, "--run.resume"]) == 0
    assert f"going on with {folder / 'checkpoints' / 'step-3.ckpt'}, of step 3, instead" in caplog.messages
    assert_same_runs(whole, folder)


def test_a_damaged_best_is_chosen_anew(root, whole, tmp_path, caplog):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    flip_a_bit(folder / "checkpoints" / "best.ckpt")
    assert train.main(tiny.options(root, folder, CHANGES | {"run.resume": "auto"})) == 0
    assert any(
        "best.ckpt cannot be read" in message and "chosen anew" in message for message in caplog.messages
    )
    best = checkpoint.load(folder / "checkpoints" / "best.ckpt")
    assert best["step"] == STEPS
    assert best["best"] == tiny.checkpoint(folder)["best"]
    assert json.loads((folder / "result.json").read_text())["miou"]["best_step"] == STEPS


def test_a_best_that_is_newer_than_the_last_stays_the_best(root, whole, tmp_path):
    """As after a crash between the two, and with arithmetic that does not repeat itself to the bit."""
    folder = tmp_path / "run"
    options = tiny.options(root, folder, CHANGES | {"run.checkpoint_every": 3, "run.keep": 9})
    assert train.main(options) == 0
    path = folder / "checkpoints" / "best.ckpt"
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"best": {**state["best"], "step": 4, "miou": 0.99}})
    content = path.read_bytes()
    for name in ("last.ckpt", "step-6.ckpt"):
        (folder / "checkpoints" / name).unlink()
    assert train.main([*options, "--run.resume=auto"]) == 0
    assert path.read_bytes() == content
    assert json.loads((folder / "result.json").read_text())["miou"] | {"last": 0} == {
        "best": 0.99,
        "best_step": 4,
        "last": 0,
    }


def test_auto_begins_a_run_in_place_of_one_that_never_came_to_a_checkpoint(
    root, whole, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    options = [*tiny.options(root, folder, CHANGES), "--run.resume=auto"]
    with monkeypatch.context() as patch:
        during(patch, Trainer, "training_step", 2, functools.partial(interrupt, signal.SIGINT))
        during(patch, Trainer, "save", 1, leave)
        assert train.main(options) == 130
    assert [row["step"] for row in tiny.log(folder)] == [1, 2]
    assert train.main(options) == 0
    assert_same_runs(whole, folder)
    assert len(list((folder / "log").glob("events*"))) == 1


def test_a_stop_during_an_evaluation_is_saved(root, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        during(patch, trainer, "evaluate", 1, interrupt)
        assert train.main(tiny.options(root, tmp_path / "run", CHANGES)) == 130
    assert tiny.checkpoint(tmp_path / "run")["step"] == 2
    assert train.main(command_to_go_on(capsys.readouterr().out)) == 0
    assert_same_runs(whole, tmp_path / "run")


def test_a_stop_in_the_last_step_finishes_the_run(root, whole, tmp_path, monkeypatch):
    during(monkeypatch, Trainer, "training_step", STEPS, interrupt)
    assert train.main(tiny.options(root, tmp_path / "run", CHANGES)) == 0
    assert_same_runs(whole, tmp_path / "run")


def test_a_second_stop_is_at_once(root, tmp_path, monkeypatch):
    def twice():
        interrupt()
        interrupt()

    during(monkeypatch, Trainer, "training_step", 2, twice)
    assert train.main(tiny.options(root, tmp_path / "run")) == 130
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_stop_by_sigterm_to_all_processes_is_saved(root, tmp_path, monkeypatch):
    def terminate():
        workers = multiprocessing.active_children()
        assert workers
        # By a process of its own: a worker takes a signal of its parent for the end of the work.
        subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
        workers[0].join(0.5)
        interrupt(signal.SIGTERM)

    during(monkeypatch, Trainer, "training_step", 2, terminate)
    options = tiny.options(root, tmp_path / "run", {"optim.steps": 8, "data.workers": 1})
    assert train.main(options) == 130
    assert tiny.checkpoint(tmp_path / "run")["step"] == 2


def test_a_run_whose_terminal_is_closed_is_saved(root, tmp_path):
    folder = tmp_path / "run"
    changes = {"optim.steps": 10_000, "run.log_every": 1, "run.eval_every": 10_000, "data.workers": 1}
    arguments = [sys.executable, "-m", "pseudoseg_fast.train", *tiny.options(root, folder, changes)]
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # though the tests may run under nohup
        os.execv(sys.executable, arguments)
    printed = b""
    while b"step     2/" not in printed:
        printed += os.read(terminal, 4096)
    os.close(terminal)
    assert killing.wait(process, 60) == 130
    assert tiny.checkpoint(folder)["step"] >= 2


def test_nohup_keeps_a_run_from_stopping(root, tmp_path, monkeypatch):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        during(monkeypatch, Trainer, "training_step", 2, functools.partial(interrupt, signal.SIGHUP))
        assert train.main(tiny.options(root, tmp_path / "run")) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_finished_run_that_goes_on_shows_its_results_again(root, tmp_path, capsys):
    options = tiny.options(root, tmp_path / "run")
    assert train.main(options) == 0
    first, result = capsys.readouterr().out, (tmp_path / "run" / "result.json").read_text()
    (tmp_path / "run" / "result.json").unlink()
    assert train.main([*options, "--run.resume=auto"]) == 0
    assert first.split("\nlast step")[1] == capsys.readouterr().out.split("\nlast step")[1]
    assert (tmp_path / "run" / "result.json").read_text() == result


def test_a_run_that_goes_back_has_not_finished(root, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    options = tiny.options(
        root, folder, CHANGES | {"run.checkpoint_every": 2, "run.keep": 3, "run.draw_every": 1}
    )
    assert train.main(options) == 0
    assert read_run(folder).finished
    during(monkeypatch, Trainer, "training_step", 1, interrupt)
    assert train.main([*options, f"--run.resume={folder / 'checkpoints' / 'step-2.ckpt'}"]) == 130
    run = read_run(folder)
    assert (run.finished, run.steps) == (False, 3)
    assert [path.name for path in (folder / "pictures").iterdir()] == ["step_000002.png"]
    assert not (folder / "report.html").exists()
    assert "not finished: step 3 of 6" in render(run)


def test_a_finished_run_says_that_nothing_is_left(root, tmp_path, caplog):
    options = tiny.options(root, tmp_path / "run", CHANGES | {"optim.steps": 2})
    assert train.main(options) == 0
    assert "nothing is left to train" not in caplog.text
    assert train.main([*options, "--run.resume=auto"]) == 0
    assert "of step 2, the last one: nothing is left to train; give more --optim.steps" in caplog.text


def confusion_of(right):
    """Return a confusion matrix, of so many right pixels in ten."""
    return right * torch.eye(3, dtype=torch.int64) + (10 - right) * torch.eye(3, dtype=torch.int64).roll(1, 1)


@pytest.mark.parametrize("name", ["step-2.ckpt", "best.ckpt"])
def test_a_run_that_goes_back_and_dies_is_taken_up_there(root, tmp_path, monkeypatch, name):
    folder = tmp_path / "run"
    options = tiny.options(root, folder, CHANGES | {"run.checkpoint_every": 2, "run.keep": 3})
    falling = iter((9, 8, 7))
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", lambda *_, **__: Scores(tiny.CLASSES, confusion_of(next(falling))))
        assert train.main(options) == 0
    path = folder / "checkpoints" / name
    step, best = checkpoint.load(path)["step"], tiny.checkpoint(folder, "best")["step"]
    assert step == best == 2
    with monkeypatch.context() as patch:
        during(patch, Trainer, "training_step", 1, leave)
        assert train.main([*options, f"--run.resume={path}"]) == 130
    assert tiny.checkpoint(folder)["step"] == step
    assert tiny.checkpoint(folder, "best")["step"] == best
    assert train.main([*options, "--run.resume=auto"]) == 0
    assert tiny.checkpoint(folder)["step"] == STEPS


def test_ctrl_c_on_a_process_with_workers(root, tmp_path, capsys):
    steps = 20
    changes = {"optim.steps": steps, "run.eval_every": 1, "data.workers": 2}
    folder = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "pseudoseg_fast.train", *tiny.options(root, folder, changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    printed = ""
    try:
        for line in process.stdout:
            printed += line
            if "step 2/" in line:
                break
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
        printed += process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    state = tiny.checkpoint(folder)
    assert 2 <= state["step"] < steps
    assert f"stopped after step {state['step']} of {steps}" in printed

    assert train.main([*command_to_go_on(printed), "--run.eval_every=100"]) == 0
    assert train.main(tiny.options(root, tmp_path / "whole", changes | {"run.eval_every": 100})) == 0
    stopped, whole = (tiny.checkpoint(folder) for folder in (folder, tmp_path / "whole"))
    assert_same(stopped["model"], whole["model"])


@pytest.mark.parametrize("name", ["checkpoints/best.ckpt", "checkpoints/last.ckpt"])
def test_a_run_may_go_on_in_a_folder_of_its_own(root, whole, tmp_path, name):
    files = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    options = tiny.options(root, tmp_path / "new", CHANGES | {"run.resume": whole / name})
    assert train.main(options) == 0
    ours, theirs = (tiny.checkpoint(folder) for folder in (tmp_path / "new", whole))
    assert_same(ours["model"], theirs["model"])
    assert tiny.checkpoint(tmp_path / "new", "best")["best"] == ours["best"]
    scores = [row["mIoU"] for row in tiny.log(tmp_path / "new") if "mIoU" in row]
    assert scores[-1] == json.loads((tmp_path / "new" / "result.json").read_text())["miou"]["last"]
    assert files == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_a_run_goes_on_in_no_other_runs_folder(root, whole, tmp_path, capsys):
    assert train.main(tiny.options(root, tmp_path / "other", CHANGES | {"optim.steps": 1})) == 0
    changes = CHANGES | {"run.resume": whole / "checkpoints" / "best.ckpt"}
    assert train.main(tiny.options(root, tmp_path / "other", changes)) == 2
    assert f"{tmp_path / 'other'} already holds a run" in capsys.readouterr().err
    assert tiny.checkpoint(tmp_path / "other")["step"] == 1


def test_a_run_that_goes_on_in_place_of_another_does_not_take_over_its_best(root, whole, tmp_path):
    folder = tmp_path / "other"
    assert train.main(tiny.options(root, folder, CHANGES | {"optim.steps": 1})) == 0
    path = folder / "checkpoints" / "best.ckpt"
    state = checkpoint.load(path)
    checkpoint.save(path, state | {"best": state["best"] | {"miou": 0.99}})
    changes = CHANGES | {"run.resume": whole, "run.overwrite": "true"}
    assert train.main(tiny.options(root, folder, changes)) == 0
    assert checkpoint.load(path)["step"] == STEPS


def test_nothing_of_an_overwritten_run_is_left_but_what_is_not_its_own(root, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    options = tiny.options(root, folder, CHANGES)
    assert train.main(options) == 0
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    assert train.main(options) == 2
    assert (
        f"{folder} already holds a run; go on with it: --run.resume auto, replace it: --run.overwrite true"
        in capsys.readouterr().err
    )
    assert tiny.checkpoint(folder)["step"] == STEPS

    during(monkeypatch, Trainer, "training_step", 1, interrupt)
    assert train.main([*options, "--run.overwrite=true"]) == 130
    assert tiny.checkpoint(folder)["step"] == 1
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "log",
        "run.json",
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "last.ckpt",
        "notes.txt",
        "step-1.ckpt",
    ]
    assert [row["step"] for row in tiny.log(folder)] == [1]
    assert len(list((folder / "log").glob("events*"))) == 1
