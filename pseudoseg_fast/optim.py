"""The optimiser's parameter groups and the learning rate's course."""

from __future__ import annotations

import torch
from torch import nn

from pseudoseg_fast.config import OptimConfig
from pseudoseg_fast.network import Network


def make_optimizer(network: Network, config: OptimConfig) -> torch.optim.Optimizer:
    """Return SGD or AdamW over groups of one learning rate and one weight decay each.

    Encoder, attention head and the rest have their own rates; each group keeps its factor as "scale". Biases and the
    parameters of norms are not decayed.
    """
    scales = {"encoder": config.encoder_lr, "sgc": config.sgc_lr}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((scales.get(name.split(".")[0], 1.0), decay), []).append(parameter)
    options = [
        {"params": parameters, "lr": config.lr * scale, "scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(options, lr=config.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(options, lr=config.lr, fused=True)


def learning_rate(config: OptimConfig, step: int) -> float:
    """Return the learning rate of ``step``, counted from 0: linear warm-up times polynomial decay."""
    warmup = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return config.lr * warmup * (1 - step / config.steps) ** config.power


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group ``lr`` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
