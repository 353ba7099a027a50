"""The optimiser's parameter groups and the learning rate's course."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from pseudoseg_fast.config import OptimConfig
from pseudoseg_fast.network import Network


def parameter_groups(network: Network, config: OptimConfig) -> dict[tuple[float, float], list[str]]:
    """Return the names of the parameters that share a factor on the learning rate and a weight decay."""
    scales = {"encoder": config.encoder_lr, "sgc": config.sgc_lr}
    groups: dict[tuple[float, float], list[str]] = {}
    for name, parameter in network.named_parameters():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scales.get(name.split(".")[0], 1.0), decay), []).append(name)
    return groups


def make_optimizer(network: Network, config: OptimConfig) -> torch.optim.Optimizer:
    """Return SGD or AdamW over groups of one learning rate and one weight decay each.

    Encoder, attention head and the rest have their own rates; each group keeps its factor as "scale". Biases and the
    parameters of norms are not decayed.
    """
    parameters = dict(network.named_parameters())
    options = [
        {
            "params": [parameters[name] for name in names],
            "lr": config.lr * scale,
            "scale": scale,
            "weight_decay": decay,
        }
        for (scale, decay), names in parameter_groups(network, config).items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(options, lr=config.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(options, lr=config.lr, fused=True)


def regrouped(
    state: dict[str, Any],
    groups: Sequence[dict[str, Any]],
    network: Network,
    former: OptimConfig,
    config: OptimConfig,
) -> dict[str, Any]:
    """Return what an optimiser with other groups loads to keep what it knows of each parameter, such as its momentum.

    Args:
        state: of the optimiser that was made of ``former``.
        groups: ``param_groups`` in the state of the one that was made of ``config``.
        network: of both.
        former: has the factors and the weight decay there.
        config: has those here.
    """
    places, others = (
        {name: place for place, name in enumerate(itertools.chain(*parameter_groups(network, one).values()))}
        for one in (former, config)
    )
    kept = {others[name]: state["state"][place] for name, place in places.items() if place in state["state"]}
    return {"state": kept, "param_groups": list(groups)}


def learning_rate(config: OptimConfig, step: int) -> float:
    """Return the learning rate of ``step``, counted from 0: linear warm-up times polynomial decay."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return config.lr * warmup * (1 - step / config.steps) ** config.power


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
