"""The moving average of a network's weights, which makes the pseudo labels and is what is evaluated."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from pseudoseg_fast.network import Network


class Teacher:
    """Moving average of a network's weights (Tarvainen and Valpola, 2017), in evaluation mode and without gradient.

    Parameters and floating-point buffers are averaged; integer buffers are copied, since the mean of an index is none.

    Args:
        model: the network to follow; its present weights are the start.
        decay: of the average; young averages use ``min(decay, (1 + updates) / (10 + updates))``.
    """

    def __init__(self, model: Network, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: Network, updates: int) -> None:
        """Move towards ``model`` after its ``updates``-th step, counted from 0."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        averaged: list[Tensor] = []
        current: list[Tensor] = []
        copied: list[Tensor] = []
        sources: list[Tensor] = []
        theirs = model.state_dict()
        for name, ours in self.model.state_dict().items():
            if ours.is_floating_point():
                averaged.append(ours)
                current.append(theirs[name].to(ours.dtype))
            else:
                copied.append(ours)
                sources.append(theirs[name])
        torch._foreach_lerp_(averaged, current, 1 - decay)
        if copied:
            torch._foreach_copy_(copied, sources)
        self.model.eval()  # at which timm's networks forget what they keep of their weights, such as attention biases
