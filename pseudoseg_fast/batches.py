"""The batches of a forward pass, and which of them memory has room for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pseudoseg_fast.config import Config
from pseudoseg_fast.memory import largest_batch

Batches = tuple[dict[str, Any], dict[str, Any] | None]
"""Labelled and unlabelled batch of one forward pass."""


def count(pair: Batches) -> tuple[int, int]:
    """Return how many labelled and unlabelled pictures a pass has."""
    labeled, unlabeled = pair
    return len(labeled["name"]), len(unlabeled["name"]) if unlabeled else 0


def shrink(pair: Batches, size: int) -> Batches:
    """Return the first ``size`` labelled pictures of a pass, and as large a part of the unlabelled ones."""
    labeled, unlabeled = pair
    part = size / len(labeled["name"])

    def first(batch: dict[str, Any], count: int) -> dict[str, Any]:
        return {name: values[:count] for name, values in batch.items()}

    return first(labeled, size), first(
        unlabeled, max(1, round(part * len(unlabeled["name"])))
    ) if unlabeled else None


def what_fits(pair: Batches, config: Config, trial: Callable[[Batches], object] | None) -> str:
    """Return in words which batches did not fit into memory, which do, and what else to do.

    Args:
        pair: batches of the pass that ran out of memory.
        config: of the run.
        trial: takes a step with smaller batches; None where one process cannot try alone.
    """
    given, optim = count(pair), config.optim
    if trial is None:
        remedy = "lower --optim.batch_size"
    elif fits := largest_batch(lambda size: trial(shrink(pair, size)), given[0] - 1):
        unlabeled = count(shrink(pair, fits))[1]
        remedy = f"{fits} + {unlabeled} fit: give --optim.batch_size {fits}"
        if optim.unlabeled_batch_size:
            remedy += f" --optim.unlabeled_batch_size {unlabeled}"
        remedy += f", and --optim.accumulate {optim.accumulate * -(-given[0] // fits)} for as many in a step"
    else:
        remedy = "no batch fits"
    half = ", or use --run.precision bf16-mixed" if config.run.precision == "32-true" else ""
    return (
        f"in a pass of {given[0]} labelled and {given[1]} unlabelled pictures of {config.data.crop_size} px: "
        f"{remedy}; or lower --data.crop_size{half}"
    )
