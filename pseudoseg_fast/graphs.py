"""Passes of a step as CUDA graphs: thousands of launches recorded once and then made by the device itself.

A step of a small network is thousands of kernels of a few microseconds, and launching them one by one takes several
times as long as running them.
"""

from __future__ import annotations

import gc
import logging
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pseudoseg_fast.memory import is_out_of_memory

logger = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Losses = dict[str, Tensor]
Pass = Callable[[Batch, Batch | None, float | Tensor, Tensor | None], tuple[Losses, Losses]]
"""Labelled and unlabelled batch, weight of L_u and shares of the terms in; two dicts of losses out, and gradients."""
Recorder = Callable[[Callable[[], Any]], Callable[[], None]]

LAUNCHED = 2
"""Passes that are launched one by one before one is recorded: libraries choose their kernels in the first."""


class Graphs:
    """Makes passes, from the third of one kind in succession on as a recorded graph.

    A graph reads its batches and writes its losses at fixed places, and adds to gradients where they are: these must
    stay in place, so they are set to zero between steps, and not to None. What a network draws or decides on the CPU,
    and what it waits for, cannot be in a graph: passes that do so are launched one by one, which is logged once.

    Args:
        take: makes a pass; gets tensors on the device.
        parameters: get the gradients.
        record: turns a function without arguments into what repeats the work it gave the device.
    """

    def __init__(self, take: Pass, parameters: Iterable[nn.Parameter], record: Recorder) -> None:
        self.take = take
        self.parameters = list(parameters)
        self.learning: list[nn.Parameter] = []
        self.record = record
        self.kind: Any = None
        self.seen = 0
        self.replay: Callable[[], None] | None = None
        self.enabled = True
        self.results: tuple[Losses, Losses] = ({}, {})

    def __call__(
        self, labeled: Batch, unlabeled: Batch | None, weight: float, share: Tensor | None
    ) -> tuple[Losses, Losses]:
        """Make a pass; the losses are this pass's alone, whatever comes after.

        Args:
            labeled: labelled batch, on the device.
            unlabeled: unlabelled batch, on the device, or None.
            weight: of L_u.
            share: of the terms, or None for 1 each.
        """
        kind = (signature(labeled), signature(unlabeled or {}))
        if kind != self.kind:
            self.release()
            self.kind = kind
        self.seen += 1
        if self.enabled and self.replay is None and self.seen > LAUNCHED:
            self._record(labeled, unlabeled)
        if self.replay is None:
            return self._launch(labeled, unlabeled, weight, share)
        copy(labeled, self.labeled)
        copy(unlabeled or {}, self.unlabeled or {})
        self.weight.fill_(weight)
        self.share.fill_(1.0) if share is None else self.share.copy_(share)
        self.replay()
        means, losses = self.results
        return clone(means), clone(losses)

    def release(self) -> None:
        """Give back the memory of a graph; the next passes are launched, and then one is recorded anew."""
        if self.replay is not None and torch.cuda.is_available():
            torch.cuda.synchronize()  # it may be under way
        self.replay = None
        self.seen = 0
        self.results = ({}, {})

    def _launch(
        self, labeled: Batch, unlabeled: Batch | None, weight: float, share: Tensor | None
    ) -> tuple[Losses, Losses]:
        """Make a pass the usual way; the last one before a recording is looked at."""
        if not self.enabled or self.seen != LAUNCHED:
            return self.take(labeled, unlabeled, weight, share)
        with watched() as reasons:
            losses = self.take(labeled, unlabeled, weight, share)
        self.learning = [parameter for parameter in self.parameters if parameter.grad is not None]
        if reasons:
            self.enabled = False
            logger.info("passes are launched one by one, not recorded as CUDA graphs: %s", "; ".join(reasons))
        return losses

    def _record(self, labeled: Batch, unlabeled: Batch | None) -> None:
        """Record a pass over copies of these batches; nothing of it is run."""
        self.labeled = clone(labeled)
        self.unlabeled = clone(unlabeled) if unlabeled is not None else None
        device = labeled["image"].device
        self.weight, self.share = torch.ones((), device=device), torch.ones(5, device=device)
        for parameter in self.learning:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

        def take() -> None:
            self.results = self.take(self.labeled, self.unlabeled, self.weight, self.share)

        self.replay = self.record(take)


def record_graph(call: Callable[[], Any]) -> Callable[[], None]:
    """Record what a function launches on the GPU, without running it; return what runs it.

    Raises:
        OutOfMemoryError: torch's; memory has run out.
        RuntimeError: something in it cannot be recorded.
    """
    gc.collect()  # what is collected during a recording may give back memory, which it must not
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    # What went wrong is kept in words: an error that a variable here names would hold on to all tensors of the pass.
    reason, full = "", False
    try:
        # Other threads, which pin the memory of the next batches, may go on.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            try:
                call()
            except RuntimeError as error:
                reason, full = str(error), is_out_of_memory(error)
                raise
    except RuntimeError as error:
        # Ending such a recording fails as well: torch then leaves its own stream, and the later error says little.
        torch.cuda.set_stream(stream)
        if full or is_out_of_memory(error):
            raise torch.OutOfMemoryError(reason or str(error)) from None
        raise RuntimeError(
            "the passes of this network cannot be recorded as CUDA graphs: "
            f"{reason or error}; give --run.cuda_graphs false"
        ) from error
    return graph.replay


@contextmanager
def watched() -> Iterator[list[str]]:
    """Find out why what is done inside cannot be recorded; the reasons are complete at the end."""
    reasons: list[str] = []
    before = drawn_so_far()
    mode = torch.cuda.get_sync_debug_mode() if torch.cuda.is_available() else 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield reasons
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode(mode)
    waits = [one for one in caught if "called a synchronizing" in str(one.message)]
    for one in caught:
        if one not in waits and not str(one.message).startswith("Synchronization debug mode is a prototype"):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if waits:
        reasons.append(f"the network waits for the device ({waits[0].filename}:{waits[0].lineno})")
    if drawn_so_far() != before:
        reasons.append("the network draws random numbers on the CPU")


def drawn_so_far() -> list[Any]:
    """Return the states of the CPU's random generators, to be compared."""
    _, keys, *place = np.random.get_state(legacy=True)  # noqa: NPY002 - what a network may draw from
    return [torch.get_rng_state().tolist(), random.getstate(), list(keys), place]


def signature(batch: Batch) -> list[tuple[str, torch.Size, torch.dtype]]:
    """Return what must stay the same in a recorded batch."""
    return [(name, value.shape, value.dtype) for name, value in sorted(batch.items())]


def clone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, without their graph of derivatives."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copy tensors into others."""
    for name, value in source.items():
        target[name].copy_(value, non_blocking=True)
