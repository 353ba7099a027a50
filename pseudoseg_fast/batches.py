"""The batches of a forward pass: which the norms of a network can take, and which memory has room for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from pseudoseg_fast.config import Config
from pseudoseg_fast.memory import largest_batch
from pseudoseg_fast.network import Network
from pseudoseg_fast.step import has_batch_norm

Batches = tuple[dict[str, Any], dict[str, Any] | None]
"""Labelled and unlabelled batch of one forward pass."""


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return the tensors of a batch on a device, without waiting for them."""
    return {
        name: value.to(device, non_blocking=True)
        for name, value in batch.items()
        if isinstance(value, Tensor)
    }


def smallest_passes(config: Config) -> dict[str, int]:
    """Return how many pictures the smallest passes in training mode have, by the option that decides it."""
    optim, method = config.optim, config.method
    smallest = {"optim.batch_size": optim.batch_size}
    if method.name == "pseudoseg":
        option = "optim.unlabeled_batch_size" if optim.unlabeled_batch_size else "optim.batch_size"
        sizes = [] if method.joint is True else [1]
        sizes += [] if method.ema else [2 if method.flip_labels else 1]
        if sizes:
            size = min(sizes) * (optim.unlabeled_batch_size or optim.batch_size)
            smallest[option] = min(size, smallest.get(option, size))
    return smallest


def check_norms(network: Network, config: Config) -> None:
    """Refuse a pass of one picture whose batch norms would have one value per channel, now and not when it comes.

    Args:
        network: on the CPU; stays as it is.
        config: of the run.

    Raises:
        ValueError: there is such a pass.
    """
    alone = [option for option, size in smallest_passes(config).items() if size == 1]
    if not alone or not has_batch_norm(network):
        return
    probe = copy.deepcopy(network).train()
    side = -(-config.data.crop_size // network.stride) * network.stride
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():  # shapes alone: nothing is computed
            probe(torch.zeros(1, network.in_channels, side, side), sgc=config.method.name == "pseudoseg")
    except ValueError as error:
        raise ValueError(
            f"{alone[0]} 1 makes passes of one picture, and the batch norms of {config.model.arch} need more than one "
            f"value per channel; give --{alone[0]} 2, with a smaller --data.crop_size if memory is short"
        ) from error


def check_sizes(network: Network, config: Config, picture: Tensor) -> None:
    """Refuse a network that cannot take crops or val pictures, now and not at the first evaluation.

    Args:
        network: on the CPU; stays as it is.
        config: of the run.
        picture: one of those to evaluate on, [C', H, W].

    Raises:
        ValueError: it fails at a size, in evaluation mode.
    """
    side = config.data.crop_size
    shapes = copy.deepcopy(network).eval().to("meta")  # nothing is computed
    for name, (height, width) in (("crops", (side, side)), ("val pictures", picture.shape[1:])):
        images = network.pad(torch.zeros(1, network.in_channels, height, width))[0]
        try:
            with torch.no_grad():
                shapes(images.to("meta"))
            continue
        except Exception:  # the network's own, or of what it does with numbers that are not there
            shapes = copy.deepcopy(network).eval().to("meta")
        try:
            with torch.no_grad():
                copy.deepcopy(network).eval()(images)
        except Exception as error:
            raise ValueError(
                f"{config.model.arch} with {config.model.encoder_name} cannot take {name} of {width} x {height} "
                f"pixels: {error}; choose another --data.crop_size or --data.short_side, or an encoder for any size "
                '(one that timm builds for one size may take others with --model.decoder \'{"img_size": [H, W], '
                '"strict_img_size": false}\')'
            ) from error


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
