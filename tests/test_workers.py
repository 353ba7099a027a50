"""The end of the processes that read pictures."""

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from pseudoseg_fast.stop import end_quietly, work_quietly

READING = """
import signal
import time
from torch.utils.data import DataLoader
from pseudoseg_fast.loaders import start_worker
from pseudoseg_fast.stop import end_quietly

class Slow:
    def __len__(self):
        return 10_000

    def __getitem__(self, index):
        time.sleep(0.01)
        return index

def read(method):
    loader = DataLoader(Slow(), num_workers=2, worker_init_fn=start_worker, multiprocessing_context=method)
    for count, _ in enumerate(loader):
        if count > 0:  # both workers are past their imports, which print a traceback
            print("reading", flush=True)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's jobs in the background ignore
    end_quietly()
    read({method!r})
"""


def test_after_ctrl_c_workers_that_are_gone_are_no_news(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: shown.append(kind))
    end_quietly()
    for kind in (EOFError, KeyboardInterrupt, EOFError, ConnectionResetError, ValueError):
        sys.excepthook(kind, kind(), None)
    assert shown == [EOFError, ValueError]


def test_a_worker_says_what_goes_wrong_but_not_that_the_main_process_is_gone(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, *_: shown.append(kind))
    work_quietly()
    for kind in (EOFError, ConnectionResetError, ValueError):
        sys.excepthook(kind, kind(), None)
    assert shown == [ValueError]


PRELOADED = """
import multiprocessing
import pseudoseg_fast.loaders

with multiprocessing.get_context("forkserver").Pool(1) as pool:
    print(pool.apply(eval, ("'torchvision' in __import__('sys').modules",)))
"""


@pytest.mark.skipif(
    "forkserver" not in multiprocessing.get_all_start_methods(), reason="no server to fork from"
)
def test_workers_that_are_forked_from_a_server_have_the_libraries_at_once():
    """``eval`` needs none of them, so that a worker without them would say so."""
    assert subprocess.check_output([sys.executable, "-c", PRELOADED], text=True) == "True\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no groups of processes")
def test_a_command_that_ctrl_c_ends_waits_for_no_worker(tmp_path):
    """Nor does it print a traceback, which holds on to the loader until the end of Python."""
    processes = []
    for method in ("fork", "forkserver", "spawn"):
        script = tmp_path / f"{method}.py"
        script.write_text(READING.format(method=method))
        processes.append(
            subprocess.Popen(
                [sys.executable, script],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                text=True,
            )
        )
    try:
        for process in processes:
            assert process.stdout.readline() == "reading\n"
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it, too
            said = process.communicate(timeout=60)[1]
            assert process.returncode == -signal.SIGINT
            assert said == ""
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
