"""What a run says of itself while it goes: means since the last line, a line per interval, a bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm


class Progress:
    """Counts the steps of a loop, between ``with`` and its end; on a terminal a bar shows them.

    Messages of :mod:`logging` are printed above the bar meanwhile; so is what :func:`say` prints.

    Args:
        steps: of the whole run.
        done: of them, before the loop.
        shown: by this process; of several one alone prints.
    """

    def __init__(self, steps: int, done: int, *, shown: bool = True) -> None:
        self.steps = steps
        self.done = done
        self.shown = shown
        self.losses: list[dict[str, Tensor]] = []
        self.pictures = 0
        self.began = time.monotonic()
        self.first: tuple[int, float] | None = None

    def __enter__(self) -> Progress:
        self.began = time.monotonic()
        self.open = ExitStack()
        # Where stderr is no terminal there is no bar: a log file would keep every one.
        self.bar = self.open.enter_context(
            tqdm(
                total=self.steps,
                initial=self.done,
                desc="train",
                unit="step",
                dynamic_ncols=True,
                disable=None if self.shown else True,
            )
        )
        self.open.enter_context(logging_redirect_tqdm())
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def add(self, losses: dict[str, Tensor], *batches: Mapping[str, Any] | None) -> None:
        """Count one step, its loss terms on the device and its batches, whose ``name`` lists their pictures."""
        self.losses.append(losses)
        self.pictures += sum(len(batch["name"]) for batch in batches if batch)
        self.done += 1
        if self.first is None:  # it compiles, fills caches and starts workers: no measure of those to come
            self.first = (self.done, time.monotonic())
        self.bar.update()

    def read(self) -> dict[str, float]:
        """Return the mean of each term and images_per_second, and begin a new interval."""
        names = list(dict.fromkeys(name for losses in self.losses for name in losses))
        means = {
            name: torch.stack([losses[name] for losses in self.losses if name in losses]).mean()
            for name in names
        }
        values = {name: float(mean) for name, mean in means.items()}
        values["images_per_second"] = self.pictures / max(1e-9, time.monotonic() - self.began)
        self.losses, self.pictures = [], 0
        self.began = time.monotonic()
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the rate."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began

    def show(self, values: Mapping[str, float]) -> None:
        """Print the :meth:`line` of an interval."""
        if self.shown:
            say(self.line(values))

    def line(self, values: Mapping[str, float]) -> str:
        """Return what :meth:`read` gave, ``lr`` and ``memory_MiB`` as a line; ETA counts evaluations, too."""
        losses = [f"{name} {value:.4g}" for name, value in values.items() if name.startswith("L_")]
        return "  ".join(
            [
                f"step {self.done:>{len(str(self.steps))}}/{self.steps}",
                *losses,
                f"lr {values['lr']:.3g}",
                f"{values['images_per_second']:.3g} images/s",
                f"ETA {self.eta()}",
                f"memory {values['memory_MiB']:.0f} MiB",
            ]
        )

    def eta(self) -> str:
        """Return the time that the steps left will take if they go on like those since the first; "?" before that."""
        if self.first is None or self.done == self.first[0]:
            return "?"
        step, moment = self.first
        return clock((self.steps - self.done) * (time.monotonic() - moment) / (self.done - step))


def clock(seconds: float) -> str:
    """Return a duration as 0:07, 12:34, 1:02:03 or 2d 03:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def say(line: str) -> None:
    """Print a line above the bar, if there is one, at once: a log file is read while it grows."""
    tqdm.write(line)
    sys.stdout.flush()
