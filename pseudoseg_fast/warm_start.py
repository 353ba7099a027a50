"""Start the network of a new run from that of a checkpoint; layers with a row per class are matched by class name."""

from __future__ import annotations

import json
import shlex
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pseudoseg_fast import checkpoint
from pseudoseg_fast.config import ModelConfig, from_dict, to_dict
from pseudoseg_fast.network import Network
from pseudoseg_fast.sgc import foreground_classes

SAME = ("arch", "encoder_name", "in_channels")
"""Options of ``model`` that must be the checkpoint's even where all tensors would fit."""

SOURCES = ("encoder_weights", "weights", "init")
"""Options of ``model`` that say where weights came from, and nothing about the network."""

NORMALIZATION = ("mean", "std")
"""Buffers of a network, and options of ``model``, of which the new run has its own."""


@dataclass(frozen=True)
class WarmStart:
    """Say what a network took from a checkpoint.

    Attributes:
        path: the checkpoint.
        step: of its run.
        kept: classes of which all is taken.
        partly: classes that are the background on one side alone: what only foreground classes have starts anew.
        anew: classes that the checkpoint does not know.
        unused: classes of the checkpoint that the network does not have.
        changed: options of ``model`` that are others now: their values there and here.
    """

    path: Path
    step: int
    kept: tuple[str, ...]
    partly: tuple[str, ...]
    anew: tuple[str, ...]
    unused: tuple[str, ...]
    changed: dict[str, tuple[Any, Any]]

    def __str__(self) -> str:
        """Summarise in a line."""
        parts = [
            f"{what}: {', '.join(names)}"
            for what, names in (
                ("starting in part anew, being the background on one side alone", self.partly),
                ("starting anew", self.anew),
                ("left out", self.unused),
            )
            if names
        ]
        parts.insert(0, f"classes kept: {', '.join(self.kept) or 'none'}")
        if self.changed:
            parts.append(f"trained with other options: {_differences(self.changed)}")
        return f"the network starts from that of {self.path}, step {self.step}; {'; '.join(parts)}"


def start_from(network: Network, config: ModelConfig, classes: Sequence[str], path: Path | str) -> WarmStart:
    """Copy the network that a checkpoint's run evaluated into a new run's network, in place.

    That is the teacher where the checkpoint has one. What does not depend on classes is copied as it is, but for mean
    and std, of which the run has its own. Of the last convolution of the segmentation head [C, ...], the classifier
    [K, ...] and SGC's projection [C, C] and shift [C], the rows (and the projection's columns) of classes that both
    sides name are copied, and the others stay as they are in ``network``.

    Args:
        network: the new one, on the CPU; its rows are those of ``classes``.
        config: what it was made of.
        classes: its C classes, in the order of their ids.
        path: the checkpoint.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no whole checkpoint, or of a network that does not fit; ``network`` is as it was.
    """
    state = checkpoint.load(path)
    source: dict[str, Tensor] = state["teacher"] or state["model"]
    changed = _changed(from_dict(state["config"]).model, config, source, network)
    if any(name in changed for name in SAME):
        raise ValueError(_misfit(path, changed))
    target = network.state_dict()
    ours = _class_axes(network, classes, network.background)
    theirs = _class_axes(network, state["classes"], state["background"])
    copied = [name for name in target if name not in NORMALIZATION]
    for name in [*copied, *(name for name in source if name not in target)]:
        axes = [len(axis) for axis in theirs.get(name, ())]
        expected = [*axes, *target[name].shape[len(axes) :]] if name in target else None
        got = list(source[name].shape) if name in source else None
        if got != expected:
            raise ValueError(
                f"{_misfit(path, changed)}; of its tensors {name} was expected to be "
                f"{'absent' if expected is None else expected}, got {'none' if got is None else got}"
            )
    with torch.no_grad():
        for name in copied:
            if name in ours:
                _copy_classes(target[name], source[name], ours[name], theirs[name])
            else:
                target[name].copy_(source[name])
    former = _roles(state["classes"], state["background"])
    now = _roles(classes, network.background)
    return WarmStart(
        path=Path(path),
        step=state["step"],
        kept=tuple(name for name in classes if former.get(name) == now[name]),
        partly=tuple(name for name in classes if name in former and former[name] != now[name]),
        anew=tuple(name for name in classes if name not in former),
        unused=tuple(name for name in former if name not in now),
        changed=changed,
    )


def _changed(
    former: ModelConfig, now: ModelConfig, source: dict[str, Tensor], network: Network
) -> dict[str, tuple[Any, Any]]:
    """Return the options that are others now, their values there and here; of mean and std the values in use count."""
    there, here = to_dict(former), to_dict(now)
    return {
        name: (there[name], here[name])
        for name in here
        if name not in SOURCES
        and there[name] != here[name]
        and not (name in NORMALIZATION and torch.equal(source[name], getattr(network, name)))
    }


def _class_axes(
    network: Network, classes: Sequence[str], background: int | None
) -> dict[str, tuple[Sequence[Hashable], ...]]:
    """Return the tensors that depend on classes, and what the places along each of their first axes stand for.

    Args:
        network: of the same architecture.
        classes: C names, in the order of their ids.
        background: index of the background class, or None.
    """
    head = [
        name for name, module in network.segmentation_head.named_modules() if isinstance(module, nn.Conv2d)
    ][-1]
    foreground = [classes[index] for index in foreground_classes(len(classes), background)]
    # What SGC projects begins with a map of the background, which is of another kind than those of other classes.
    maps = [(name, "map") for name in foreground]
    if background is not None:
        maps.insert(0, (classes[background], "background"))
    return {
        f"segmentation_head.{head}.weight": (classes,),
        f"segmentation_head.{head}.bias": (classes,),
        "classifier.weight": (foreground,),
        "classifier.bias": (foreground,),
        "sgc.projection": (classes, maps),
        "sgc.shift": (classes,),
    }


def _copy_classes(
    target: Tensor,
    source: Tensor,
    ours: Sequence[Sequence[Hashable]],
    theirs: Sequence[Sequence[Hashable]],
) -> None:
    """Copy what is of the same classes along every one of the first axes; the rest of ``target`` stays."""
    to, of = [], []
    for here, there in zip(ours, theirs, strict=True):
        places = {label: index for index, label in enumerate(there)}
        shared = [(index, places[label]) for index, label in enumerate(here) if label in places]
        to.append(torch.tensor([index for index, _ in shared], dtype=torch.long))
        of.append(torch.tensor([index for _, index in shared], dtype=torch.long))
    target[torch.meshgrid(*to, indexing="ij")] = source[torch.meshgrid(*of, indexing="ij")]


def _roles(classes: Sequence[str], background: int | None) -> dict[str, bool]:
    """Return for each class whether it is the background."""
    return {name: index == background for index, name in enumerate(classes)}


def _differences(changed: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"model.{name} {there} there, {here} here" for name, (there, here) in changed.items())


def _misfit(path: Path | str, changed: dict[str, tuple[Any, Any]]) -> str:
    """Return that a checkpoint does not fit, why, and what to do."""
    expected = f"model.init expected a checkpoint of a network like this run's, {path} is of another one"
    if not changed:
        return (
            f"{expected}, though no model option differs: give one that was written with the installed versions of "
            "segmentation-models-pytorch and timm"
        )
    options = " ".join(
        shlex.quote(f"--model.{name}={there if isinstance(there, str) else json.dumps(there)}")
        for name, (there, _) in changed.items()
        if name not in NORMALIZATION
    )
    return f"{expected}: {_differences(changed)}; give {options}, or another checkpoint"
