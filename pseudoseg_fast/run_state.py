"""What a checkpoint holds of a run, and how a run takes it up again."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pseudoseg_fast.config import Config, DataConfig, OptimConfig, to_dict
from pseudoseg_fast.data.sets import Data
from pseudoseg_fast.data.stream import Stream
from pseudoseg_fast.optim import regrouped

if TYPE_CHECKING:
    from pseudoseg_fast.trainer import Trainer

logger = logging.getLogger(__name__)

FREE_ON_RESUME = {
    *("data.root", "data.workers", "data.cache", "model.init"),
    *("run.dir", "run.resume", "run.overwrite", "run.accelerator", "run.devices"),
    *("run.compile", "run.cuda_graphs", "run.nonfinite"),
    *("run.eval_every", "run.draw_every", "run.checkpoint_every", "run.keep", "run.log_every"),
}
"""Options that do not decide a run's result: a run may go on with them changed."""

MAY_CHANGE = {
    *("optim.lr", "optim.encoder_lr", "optim.sgc_lr", "optim.weight_decay", "optim.warmup", "optim.power"),
    *("optim.steps", "optim.batch_size", "optim.unlabeled_batch_size", "optim.accumulate"),
    *("run.precision", "data.short_side", "data.crop_size"),
}
"""Options that decide how a run goes on but not what it trains: it may go on with them changed, with a warning.

What a run advises when it has diverged, or has no memory left, is among them.
"""

LOOKED_AT = 10_000
"""Names of unlabelled pictures that tell one list from another."""

SHARES = ("start_u", "ramp_u")
"""Options of ``method`` that may be given as shares of the run."""

GROUPING = ("encoder_lr", "sgc_lr", "weight_decay")
"""Options of ``optim`` that decide the optimiser's groups."""


def state_of(trainer: Trainer, generators: list[list[Tensor]]) -> dict[str, Any]:
    """Return all that :func:`restore_state` needs; ``generators`` are the states of all processes, by rank."""
    return {
        "config": to_dict(trainer.config),
        "classes": trainer.data.classes,
        "background": trainer.data.background,
        "lists": trainer.lists,
        "shares_of": trainer.shares_of,
        "step": trainer.step,
        "scored": trainer.scored,
        "skipped_steps": trainer.stepper.skipped_steps,
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
        ValueError: it is of a run with another network or method, or longer than this one.
    """
    trainer.shares_of, notes = keep_start(trainer.config, state["config"], state.get("shares_of", {}))
    changes = check_same_run(trainer, path, state)
    notes = [*(f"{name} {there} -> {here}" for name, (there, here) in changes.items()), *notes]
    if notes and trainer.fabric.is_global_zero:
        logger.warning(
            "going on from %s with changed options, %s: the result is not that of one run",
            path,
            ", ".join(notes),
        )
    if "data.short_side" in changes and trainer.fabric.is_global_zero:
        logger.warning(
            "data.short_side decides at which size val pictures are scored, too: scores do not compare with those from "
            "here on"
        )
    if trainer.fabric.is_global_zero:
        warn_of_other_lists(trainer.lists, path, state.get("lists", {}))  # older checkpoints have none
    trainer.network.load_state_dict(state["model"])
    if trainer.teacher:
        trainer.teacher.model.load_state_dict(state["teacher"])
    trainer.optimizer.load_state_dict(optimizer_state(trainer, state))
    trainer.step, trainer.scored, trainer.seconds = state["step"], state["scored"], state["seconds"]
    trainer.stepper.skipped_steps = state.get("skipped_steps", 0)
    if state["precision"]:  # of 16-mixed alone; a run that comes to it from another one begins with its own
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


def fingerprints(data: Data) -> dict[str, str]:
    """Return a digest of the number and names of labelled, unlabelled and val pictures each.

    The order counts but for val pictures, whose scores do not depend on it.

    Of unlabelled pictures, of which there may be millions, ``LOOKED_AT`` names count, spread over the list.
    """
    pool = data.unlabeled
    if isinstance(pool, Stream):
        unlabeled = [str(pool.size), *pool.shards]
    else:
        number = len(pool.names)
        places = range(0, number, -(-number // LOOKED_AT) or 1)
        unlabeled = [str(number), *(pool.names[place] for place in places)]
    lists: dict[str, Iterable[str]] = {
        "labelled": (sample.name for sample in data.labeled),
        "unlabelled": unlabeled,
        "val, sorted": sorted(sample.name for sample in data.val),
    }
    return {
        kind: hashlib.sha256("\0".join(names).encode("utf-8", "surrogateescape")).hexdigest()
        for kind, names in lists.items()
    }


def warn_of_other_lists(ours: dict[str, str], path: Path, theirs: dict[str, str]) -> None:
    """Say which lists of pictures are others than those of the run that wrote ``path``, and what that means."""
    # Older checkpoints have val pictures in their order; nothing is said of these.
    others = [kind for kind, digest in theirs.items() if digest != ours.get(kind, digest)]
    if learnt := [kind for kind in others if kind != "val, sorted"]:
        logger.warning(
            "the %s pictures are others than when %s was written, by number, name or order: steps see others than they "
            "would have",
            " and ".join(learnt),
            path,
        )
    if "val, sorted" in others:
        logger.warning(
            "the val pictures are others than when %s was written: scores do not compare with those from here on",
            path,
        )


def scored_alike(state: dict[str, Any], lists: dict[str, str], data: DataConfig) -> bool:
    """Say whether the score in a checkpoint is of the val pictures that a run has, at the size that it scores them at.

    Args:
        state: of the checkpoint; an older one does not say which pictures it had, and is believed.
        lists: of the run, from :func:`fingerprints`.
        data: of the run.
    """
    val = state.get("lists", {}).get("val, sorted", lists["val, sorted"])
    return val == lists["val, sorted"] and saved_options(state)["data"]["short_side"] == data.short_side


def optimizer_state(trainer: Trainer, state: dict[str, Any]) -> dict[str, Any]:
    """Return what the optimiser loads: what the checkpoint has, in groups as they are now."""
    former = OptimConfig(**{name: saved_options(state)["optim"][name] for name in GROUPING})
    optim = trainer.config.optim
    if all(getattr(former, name) == getattr(optim, name) for name in GROUPING):
        return state["optimizer"]
    groups = trainer.optimizer.state_dict()["param_groups"]
    return regrouped(state["optimizer"], groups, trainer.network, former, optim)


def keep_start(
    config: Config, saved: dict[str, Any], shares_of: dict[str, int]
) -> tuple[dict[str, int], list[str]]:
    """Leave ``start_u`` and ``ramp_u`` as they were where they are the same shares of another number of steps.

    Such a share is not told from a number of steps that happens to be the same.

    Args:
        config: of the run that goes on.
        saved: the configuration of the checkpoint.
        shares_of: for each, the steps it was a share of when it got its value, which may be fewer than those that the
            checkpoint's run had in the end; a run goes on to more steps more than once, or again with the same command.

    Returns:
        ``shares_of`` from here on, and for each that stays, what it stays, in words.
    """
    ours, theirs = config.optim.steps, saved["optim"]["steps"]
    kept, notes = {}, []
    for name in SHARES:
        kept[name] = shares_of.get(name, theirs)
        here, there = getattr(config.method, name), saved["method"].get(name)
        if there is None or here == there:
            continue
        for steps in (kept[name], theirs):
            if steps != ours and abs(here / ours - there / steps) <= 0.5 / ours + 0.5 / steps:
                kept[name] = steps
                setattr(config.method, name, there)
                notes.append(f"method.{name} stays {there} (not {here}, its share of {ours} steps)")
                break
    return kept, notes


def saved_options(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the configuration in a checkpoint, with the defaults of options that are younger than it."""
    defaults = to_dict(Config(data=DataConfig(root="")))
    return {
        group: {**defaults[group], **state["config"][group]}
        for group in ("data", "model", "method", "optim", "run")
    }


def check_same_run(trainer: Trainer, path: Path, state: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Raise ValueError if ``state`` is of a run that is configured otherwise, in what matters; the message says how.

    Returns:
        The options of ``MAY_CHANGE`` that are others now: their values there and here.
    """
    ours = to_dict(trainer.config)
    differences = {
        f"{group}.{name}": (value, ours[group].get(name))
        for group, values in saved_options(state).items()
        for name, value in values.items()
        if f"{group}.{name}" not in FREE_ON_RESUME and value != ours[group].get(name)
    }
    differences.pop("data.background", None)  # what it comes to counts, see below
    changes = {name: values for name, values in differences.items() if name in MAY_CHANGE}
    refused = [
        f"{name}: {there} there, {here} here"
        for name, (there, here) in differences.items()
        if name not in MAY_CHANGE
    ]
    if state["classes"] != trainer.data.classes:
        refused.append(f"classes: {state['classes']} there, {trainer.data.classes} here")
    if state["background"] != trainer.data.background:
        there, here = (
            "null" if index is None else index for index in (state["background"], trainer.data.background)
        )
        refused.append(f"the background: class {there} there, {here} here; give --data.background {there}")
    if refused:
        raise ValueError(
            f"{path} is of a run with another configuration; resume with the same one "
            f"({path.parent.parent / 'config.yaml'}), or start anew:\n  " + "\n  ".join(refused)
        )
    if "optim.steps" in changes and state["step"] > trainer.config.optim.steps:
        raise ValueError(
            f"{path} is of step {state['step']}; expected optim.steps to be no less, got "
            f"{trainer.config.optim.steps}"
        )
    return changes


def generator_states() -> list[Tensor]:
    """Return the states of torch's generators: the CPU's and, on a GPU, that of the present device."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else states


def set_generator_states(states: list[Tensor]) -> None:
    """Set what :func:`generator_states` returned; a state of a GPU is left out where there is none."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states[1])
