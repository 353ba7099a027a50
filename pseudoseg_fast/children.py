"""The processes that ``run.devices`` starts: which of them a signal has ended."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from subprocess import Popen
from typing import Any

from lightning_fabric import Fabric

PERIOD = 0.2
GRACE = 1.0
"""Seconds that a process which has lost another waits to hear of its end."""


def children_of(fabric: Fabric) -> Sequence[Popen[Any]]:
    """Return the processes that this one started, in the order of their ranks, 1 and so on."""
    return getattr(fabric.strategy.launcher, "procs", [])


class Watcher(threading.Thread):
    """Says when a signal ends one of the processes that this one started; the others only tell of a lost connection.

    It says so at once, since Fabric ends this process, too, without a word, within seconds.

    Args:
        fabric: launched.
    """

    def __init__(self, fabric: Fabric) -> None:
        super().__init__(daemon=True)
        self.children = children_of(fabric)
        self.told: set[int] = set()
        self.over = threading.Event()
        self.lock = threading.Lock()
        if self.children:
            self.start()

    def run(self) -> None:
        """Look again and again."""
        while not self.over.wait(PERIOD):
            self.look()

    def look(self) -> None:
        """Say which processes a signal has ended since the last look."""
        with self.lock:
            for rank, child in enumerate(self.children, start=1):
                status = child.poll()
                if status is not None and status < 0 and rank not in self.told:
                    self.told.add(rank)
                    with suppress(OSError):  # there may be nobody left to read it
                        os.write(2, f"process {rank} was {death(-status)}\n".encode())

    def end(self, *, failed: bool) -> None:
        """Look a last time, where this process has failed when others have had time to end, and no more."""
        latest = time.monotonic() + GRACE
        while failed and self.children and not self._any_ended() and time.monotonic() < latest:
            time.sleep(PERIOD / 4)
        self.look()
        self.over.set()

    def _any_ended(self) -> bool:
        return any(child.poll() is not None for child in self.children)


def death(number: int) -> str:
    """Return in words what a signal did to a process."""
    try:
        name = f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        name = f"signal {number}"
    if number == signal.SIGKILL:
        return f"killed by {name}, which usually means that the machine had no memory left"
    return f"ended by {name}"
