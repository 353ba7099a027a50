"""Signals of the processes that read pictures: the main process decides when they end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from pseudoseg_fast.loaders import start_worker

READING = """
import time
from torch.utils.data import DataLoader
from pseudoseg_fast.loaders import start_worker

class Slow:
    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        time.sleep(0.01)
        return index

def read():
    for _ in DataLoader(Slow(), num_workers=2, worker_init_fn=start_worker):
        print("reading", flush=True)

read()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_a_terminal_ends_ends_its_workers(number):
    """Although the error holds on to the loader, so that nothing but the end of Python ends them."""
    process = subprocess.Popen(
        [sys.executable, "-c", READING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline()
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == -number
        deadline = time.monotonic() + 60
        while group_lives(process.pid):  # workers look every few seconds whether they are alone
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        if group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def work(ready):
    start_worker(0)
    ready.set()
    time.sleep(60)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not say who sent a signal")
def test_a_worker_heeds_no_signal_but_that_of_its_main_process():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(60)
    for name in ("INT", "TERM", "HUP"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0
