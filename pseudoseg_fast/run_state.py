"""What a checkpoint holds of a run, and how a run takes it up again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pseudoseg_fast.config import Config, DataConfig, to_dict

if TYPE_CHECKING:
    from pseudoseg_fast.trainer import Trainer

logger = logging.getLogger(__name__)

FREE_ON_RESUME = {
    *("data.root", "data.workers", "data.cache"),
    *("run.dir", "run.resume", "run.overwrite", "run.accelerator", "run.devices"),
    *("run.compile", "run.nonfinite"),
    *("run.eval_every", "run.draw_every", "run.checkpoint_every", "run.keep", "run.log_every"),
}
"""Options that a run may go on with changed."""


def state_of(trainer: Trainer, generators: list[list[Tensor]]) -> dict[str, Any]:
    """Return all that :func:`restore_state` needs; ``generators`` are the states of all processes, by rank."""
    return {
        "config": to_dict(trainer.config),
        "classes": trainer.data.classes,
        "background": trainer.data.background,
        "step": trainer.step,
        "scored": trainer.scored,
        "seconds": trainer.seconds,
        "best": trainer.best,
        "model": trainer.network.state_dict(),
        "teacher": trainer.teacher.model.state_dict() if trainer.teacher else None,
        "optimizer": trainer.optimizer.state_dict(),
        "precision": trainer.fabric.strategy.precision.state_dict(),
        "generators": generators,
    }


def restore_state(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    """Bring ``trainer`` to where the run was that wrote ``state`` to ``path``.

    Raises:
        ValueError: it is of a run with another network, method or schedule.
    """
    check_same_run(trainer, path, state)
    trainer.network.load_state_dict(state["model"])
    if trainer.teacher:
        trainer.teacher.model.load_state_dict(state["teacher"])
    trainer.optimizer.load_state_dict(state["optimizer"])
    trainer.step, trainer.scored, trainer.seconds = state["step"], state["scored"], state["seconds"]
    trainer.fabric.strategy.precision.load_state_dict(state["precision"])
    generators, processes = state["generators"], trainer.fabric.world_size
    if len(generators) == processes:
        set_generator_states(generators[trainer.fabric.global_rank])
    elif trainer.fabric.is_global_zero:
        logger.warning(
            "%s is of a run with %d processes, this one has %d: a step sees %.3g times as many pictures, and others, "
            "at the same learning rate; --optim.accumulate makes up for fewer processes",
            path,
            len(generators),
            processes,
            processes / len(generators),
        )


def check_same_run(trainer: Trainer, path: Path, state: dict[str, Any]) -> None:
    """Raise ValueError if ``state`` is of a run that is configured otherwise, in what matters; the message says how."""
    ours = to_dict(trainer.config)
    defaults = to_dict(Config(data=DataConfig(root="")))  # of options that are younger than the checkpoint
    free = FREE_ON_RESUME
    if len(state["generators"]) != trainer.fabric.world_size:
        free = free | {"optim.accumulate"}  # makes up for the processes that are missing
    differences = [
        f"{group}.{name}: {value} there, {ours[group].get(name)} here"
        for group in ("data", "model", "method", "optim", "run")
        for name, value in {**defaults[group], **state["config"][group]}.items()
        if f"{group}.{name}" not in free and value != ours[group].get(name)
    ]
    if state["classes"] != trainer.data.classes:
        differences.append(f"classes: {state['classes']} there, {trainer.data.classes} here")
    if differences:
        raise ValueError(
            f"{path} is of a run with another configuration; resume with the same one "
            f"({path.parent.parent / 'config.yaml'}), or start anew:\n  " + "\n  ".join(differences)
        )


def generator_states() -> list[Tensor]:
    """Return the states of torch's generators: the CPU's and, on a GPU, that of the present device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states


def set_generator_states(states: list[Tensor]) -> None:
    """Set what :func:`generator_states` returned; a state of a GPU is left out where there is none."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states[1])
