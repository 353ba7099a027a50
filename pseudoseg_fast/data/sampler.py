"""Batches without end: what a step trains on depends on the seed and the step alone."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Yield the batches of training steps as lists of ``(index, sample_seed)``.

    The data set is passed through again and again, every pass in a new order; a batch may straddle two passes, and one
    larger than the data set repeats samples. The stream is a function of the seed and the position in it, so a run that
    starts at step t sees there what a run from step 0 sees, and two ranks with batches of 4 see together what one rank
    with batches of 8 sees alone.

    Args:
        length: number of samples.
        batch_size: samples in one rank's batch.
        seed: decides order and sample seeds; give two streams of one run different seeds.
        steps: steps in the whole run.
        start_step: first step to yield.
        rank: this process, 0 to ``world_size`` - 1.
        world_size: number of processes.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"length and batch_size must be at least 1, got {length} and {batch_size}")
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step must be 0 to steps = {steps}, got {start_step}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0 to world_size - 1 = {world_size - 1}, got {rank}")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.steps = steps
        self.start_step = start_step
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for step in range(self.start_step, self.steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            batch = []
            for position in range(first, first + self.batch_size):
                if position // self.length != epoch:
                    epoch = position // self.length
                    order = self._order(epoch)
                batch.append((int(order[position % self.length]), mix(self.seed, position)))
            yield batch

    def _order(self, epoch: int) -> torch.Tensor:
        """Return the permutation of one pass."""
        # The complement is negative: no pass shares its seed with a sample.
        generator = torch.Generator().manual_seed(mix(self.seed, ~epoch))
        return torch.randperm(self.length, generator=generator)


def mix(first: int, second: int) -> int:
    """Return a 32-bit number that looks random for each pair; torch's CPU generator seeds with 32 bits."""
    return int.from_bytes(
        hashlib.blake2b(struct.pack("<qq", first, second), digest_size=4).digest(), "little"
    )
