"""Kill runs at random moments, again and again, and see each time what is left and in the end what became of them."""

import contextlib
import os
import random
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass

import tiny
import torch
import yaml
from same_runs import assert_same_runs
from tqdm import tqdm

from pseudoseg_fast import checkpoint, train
from pseudoseg_fast.config import from_dict, parse_config
from pseudoseg_fast.csv_rows import read_rows
from pseudoseg_fast.distributed import make_fabric
from pseudoseg_fast.kept import newest_first

CHANGES = {
    "method.ema": 0.9,
    "method.cutmix": 0.5,  # draws from the generator that a checkpoint saves
    "optim.steps": 9,
    "run.log_every": 1,  # so that the log says how far a run came
    "run.eval_every": 3,
    "run.checkpoint_every": 2,
    "run.resume": "auto",
}
LONGEST = 120.0


@dataclass
class Kill:
    """What a killed process leaves: the last step that it logged, that of the newest checkpoint, 0 without one.

    ``saving`` says that a checkpoint was being written.
    """

    reached: int
    kept: int
    saving: bool


def fork(action, output):
    """Call ``action`` in a process of one thread, which ends with the status that it returns; return the process."""
    process = os.fork()
    if process:
        return process
    status = 99
    try:
        with open(output, "a", buffering=1) as file:
            sys.stdout = sys.stderr = file  # pytest has put others in their place
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            torch.set_num_threads(1)
            tqdm.set_lock(
                threading.RLock()
            )  # its own is shared: who is killed while holding it stops all others
            status = action()
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def wait(process, seconds=LONGEST):
    """Return the status of a process, or None where it has not ended after some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    return None


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


class Study:
    """Runs of the tiny network below ``folder``; ``run`` is what starts or continues one."""

    def __init__(self, folder, seed=0):
        self.folder = folder
        self.root = tiny.make_set(folder / "pictures")
        self.random = random.Random(seed)
        self.config = parse_config(tiny.options(self.root, folder, CHANGES), "train", "")
        self.whole = folder / "whole"
        began = time.monotonic()
        self.finish(self.whole)
        self.seconds = time.monotonic() - began

    def start(self, run):
        self.config.run.dir = str(run)
        return fork(
            lambda: train.train(self.config, make_fabric(self.config.run)), self.folder / "output.txt"
        )

    def finish(self, run):
        process = self.start(run)
        status = wait(process)
        if status is None:
            kill(process)
        assert status == 0, (self.folder / "output.txt").read_text()[-5000:]

    def kill_once(self, run):
        """Start or continue a run and kill it at a random moment; None: it had finished before.

        Every third is killed at the first checkpoint after that moment, while it is being written.
        """
        process = self.start(run)
        saving = self.random.random() < 1 / 3
        status = wait(process, self.random.uniform(0, self.seconds))
        if status is None and saving:
            while status is None and not partial(run):
                status = wait(process, 0.0005)
            status = wait(process, self.random.uniform(0, 0.02)) if status is None else status
        if status is None:
            kill(process)
            return left(run)
        assert status == 0, (self.folder / "output.txt").read_text()[-5000:]
        return None

    def __call__(self, kills):
        """Kill runs so many times, and let the last one finish; return the kills and the number of runs.

        There are more kills where chance, on a busy machine, has let none of them meet a checkpoint being written, or
        one that has been.
        """
        done, runs = [], 0

        def more():
            met = any(kill.saving for kill in done) and any(kill.kept for kill in done)
            return len(done) < kills or (not met and len(done) < 5 * kills)

        while more():
            runs += 1
            run = self.folder / f"run {runs}"
            while killed := more() and self.kill_once(run):
                done.append(killed)
            if killed is False:  # no more of them
                self.finish(run)
            assert_same_runs(self.whole, run)
        return done, runs


def partial(run):
    """The checkpoints of a run that are being written."""
    return list((run / "checkpoints").glob(".*.partial"))


def left(run):
    """Check that all files that a killed process leaves are whole, and return what they hold."""
    states = [checkpoint.load(path) for path in newest_first(run / "checkpoints")]
    kept = states[0]["step"] if states else 0
    with contextlib.suppress(FileNotFoundError):
        from_dict(yaml.safe_load((run / "config.yaml").read_text()))
    steps = [int(row["step"]) for row in read_rows(run / "log" / "metrics.csv") if "eval/mIoU" not in row]
    reached = max(steps, default=0)
    assert steps == list(range(1, reached + 1))
    interval = CHANGES["run.checkpoint_every"]
    assert reached - interval <= kept <= reached
    return Kill(reached, kept, bool(partial(run)))
