"""Signals that end a run, granted between two steps, and commands that Ctrl-C may end anywhere."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType, TracebackType

HANGUP = getattr(signal, "SIGHUP", None)
"""What a terminal sends that is closed; Windows has none."""
_GONE = (EOFError, ConnectionError)
"""What multiprocessing's thread meets that hands tensors to a process which is gone."""


class StopSignal:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a wish that the loop grants between two steps.

    A second Ctrl-C stops at once. SIGHUP stays ignored where it is, as by nohup.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        numbers = [signal.SIGINT, signal.SIGTERM]
        if HANGUP is not None and signal.getsignal(HANGUP) != signal.SIG_IGN:
            numbers.append(HANGUP)
        self.former = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; called by the interpreter."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        if number == HANGUP:
            leave_terminal()
        # Not through sys.stderr: the signal may have come while that was being written to.
        os.write(2, b"\nstopping after this step; Ctrl-C once more stops at once, without a checkpoint\n")


def leave_terminal() -> None:
    """Let go of outputs that can no longer be written, as of a closed terminal: the run still has lines to print."""
    for output in (1, 2):
        try:
            os.write(output, b"\n")
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, output)
            os.close(nowhere)


def end_quietly() -> None:
    """Let Ctrl-C end a command that has nothing to save without a traceback; shells still see that it was Ctrl-C."""
    show = sys.excepthook
    ending = False

    def show_errors(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        nonlocal ending
        if issubclass(kind, KeyboardInterrupt):
            ending = True
        elif not (ending and issubclass(kind, _GONE)):
            show(kind, error, where)

    sys.excepthook = show_errors


def work_quietly() -> None:
    """Let the main process end while a worker's thread hands it tensors, without a word of the worker's."""
    show = sys.excepthook

    def show_errors(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if not issubclass(kind, _GONE):
            show(kind, error, where)

    sys.excepthook = show_errors
