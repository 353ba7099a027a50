"""What a run measures of itself between two lines of its log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Means of loss terms and the rate of pictures since it was last read."""

    def __init__(self) -> None:
        self.losses: list[dict[str, Tensor]] = []
        self.pictures = 0
        self.began = time.monotonic()

    def add(self, losses: dict[str, Tensor], *batches: dict[str, Any] | None) -> None:
        """Count one step."""
        self.losses.append(losses)
        self.pictures += sum(len(batch["name"]) for batch in batches if batch)

    def read(self) -> dict[str, float]:
        """Return the mean of each term and images/s, and begin again."""
        names = list(dict.fromkeys(name for losses in self.losses for name in losses))
        means = {
            name: torch.stack([losses[name] for losses in self.losses if name in losses]).mean()
            for name in names
        }
        values = {name: float(mean) for name, mean in means.items()}
        values["images/s"] = self.pictures / max(1e-9, time.monotonic() - self.began)
        self.losses, self.pictures = [], 0
        self.began = time.monotonic()
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the rate."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began
