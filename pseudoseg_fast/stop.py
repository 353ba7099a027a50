"""Signals that end a run, granted between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a wish that the loop grants between two steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self.former = {
            number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; called by the interpreter."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        # Not through sys.stderr: the signal may have come while that was being written to.
        os.write(2, b"\nstopping after this step; Ctrl-C once more stops at once, without a checkpoint\n")
