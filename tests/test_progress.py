"""The bar, the lines and the figures of a run that goes on."""

import io
import logging
import sys

import pytest
import torch

from pseudoseg_fast import progress
from pseudoseg_fast.memory import peak_memory
from pseudoseg_fast.progress import Progress, clock, say

BATCH = {"name": ["a", "b"]}


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still: a list with the time."""
    moment = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: moment[0])
    return moment


class Screen(io.StringIO):
    """A terminal that knows how to begin a line and how to overwrite one."""

    def isatty(self):
        return True

    def lines(self):
        shown = []
        for line in self.getvalue().split("\n"):
            row = ""
            for text in line.split("\r"):
                row = text + row[len(text) :]
            shown.append(row.rstrip())
        return shown


def terms(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def test_the_rate_counts_neither_evaluations_nor_pictures_twice(now):
    with Progress(2, 0) as measured:
        for losses in (terms(L_s=1.0, L_u=3.0), terms(L_s=2.0)):
            now[0] += 1
            measured.add(losses, BATCH, None)
            with measured.paused():
                now[0] += 10
        values = measured.read()
    assert values == {"L_s": 1.5, "L_u": 3.0, "images_per_second": 2.0}


def test_a_line_says_where_a_run_is_and_when_it_ends(now):
    with Progress(1000, 100) as measured:
        now[0] = 60  # the first step compiles
        measured.add(terms(L_s=1.0), BATCH)
        values = {**measured.read(), "lr": 0.00123, "seconds": 60.0, "memory_MiB": 812.4}
        assert measured.line(values) == (
            "step  101/1000  L_s 1  lr 0.00123  0.0333 images/s  ETA ?  memory 812 MiB"
        )
        now[0] += 4
        measured.add(terms(L_s=0.123456), BATCH)
        with measured.paused():
            now[0] += 2  # evaluations take time, too
        values = {**measured.read(), "lr": 0.001, "seconds": 66.0, "memory_MiB": 812.4}
        assert measured.line(values) == (
            "step  102/1000  L_s 0.1235  lr 0.001  0.5 images/s  ETA 1:29:48  memory 812 MiB"
        )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"), (183_845, "2d 03:04:05")],
)
def test_durations(seconds, text):
    assert clock(seconds) == text


def loop():
    with Progress(3, 0) as measured:
        for step in range(3):
            measured.add(terms(L_s=1.0), BATCH)
            say(f"line {step}")
            logging.getLogger("pseudoseg_fast").warning("a.png cannot be read")


def test_a_log_file_has_lines_alone(capsys):
    loop()
    captured = capsys.readouterr()
    assert captured.out == "line 0\nline 1\nline 2\n"
    assert "train" not in captured.err


def test_on_a_terminal_lines_stand_above_the_bar(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logging.root, "handlers", [handler])
    loop()
    assert logging.root.handlers == [handler]
    *lines, bar, after = screen.lines()
    assert lines == [
        "line 0",
        "a.png cannot be read",
        "line 1",
        "a.png cannot be read",
        "line 2",
        "a.png cannot be read",
    ]
    assert "3/3" in bar
    assert after == ""


def test_of_several_processes_one_prints(capsys):
    with Progress(3, 0, shown=False) as measured:
        measured.add(terms(L_s=1.0), BATCH)
        measured.show({**measured.read(), "lr": 0.1, "memory_MiB": 1.0})
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_memory_of_the_cpu_is_what_the_process_had_resident():
    before = peak_memory(torch.device("cpu"))
    held = b"x" * int(2**20 * (before + 64))
    assert before + 64 <= peak_memory(torch.device("cpu")) < 3 * (before + 64)
    del held


@pytest.mark.cuda
def test_memory_of_a_gpu_is_what_tensors_held():
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats()
    before = peak_memory(device)
    torch.empty(2**24, dtype=torch.uint8, device=device)
    assert peak_memory(device) >= before + 16
