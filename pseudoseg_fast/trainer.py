"""One run: its pictures, network, teacher and optimiser, the loop over them, and their checkpoints."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import TensorBoardLogger
from torch import Tensor
from tqdm import tqdm

from pseudoseg_fast import checkpoint
from pseudoseg_fast.config import Config, choose_accelerator, to_dict
from pseudoseg_fast.csv_log import CsvLog
from pseudoseg_fast.data.dataset import CorruptCounter
from pseudoseg_fast.data.sets import Data, read_data
from pseudoseg_fast.evaluate import Scores, evaluate
from pseudoseg_fast.kept import BEST, LAST, load_first_whole, save_last
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader, val_loader
from pseudoseg_fast.meter import Meter
from pseudoseg_fast.method import Teacher, class_weights
from pseudoseg_fast.network import Network
from pseudoseg_fast.networks import build_network
from pseudoseg_fast.optim import learning_rate, make_optimizer, set_learning_rate
from pseudoseg_fast.step import StepLosses
from pseudoseg_fast.stop import StopSignal

logger = logging.getLogger(__name__)

FREE_ON_RESUME = {
    *("data.root", "data.workers", "data.cache"),
    *("run.dir", "run.resume", "run.overwrite", "run.accelerator"),
    *("run.eval_every", "run.checkpoint_every", "run.keep", "run.log_every"),
}


class Trainer:
    """One run: its pictures, network, teacher and optimiser, and the loop over them.

    Args:
        config: the resolved configuration.
        folder: where the run writes its log and checkpoints.

    Raises:
        DataError, ValueError, RuntimeError: pictures, network or weights are not what the configuration says.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.checkpoints = folder / "checkpoints"
        self.csv_log = CsvLog(folder / "log" / "metrics.csv")
        self.fabric = Fabric(
            accelerator=choose_accelerator(config.run.accelerator),
            devices=1,
            precision=config.run.precision,
            loggers=[self.csv_log, TensorBoardLogger(folder, name="", version="log")],
        )
        torch.manual_seed(config.run.seed)
        self.data: Data = read_data(config.data, unlabeled=config.method.name == "pseudoseg")
        weights = class_weights(config.method, self.data.pixels)
        network = build_network(config.model, len(self.data.classes), self.data.background)
        network.to(memory_format=torch.channels_last)
        self.teacher = Teacher(network, config.method.ema) if config.method.ema else None
        self.network = network
        losses = StepLosses(
            network,
            config.method,
            self.teacher.model.to(self.fabric.device) if self.teacher else None,
            None if weights is None else weights.to(self.fabric.device),
        )
        self.losses, self.optimizer = self.fabric.setup(losses, make_optimizer(network, config.optim))
        # Made again when training begins; what they refuse is refused before the folder is touched.
        labeled_loader(config, self.data, network, 0)
        if self.data.unlabeled:
            unlabeled_loader(config, self.data, network, 0)
        pictures = {sample.image for sample in [*self.data.labeled, *self.data.unlabeled]}
        self.corrupt = CorruptCounter(total=len(pictures))
        self.step = 0
        self.seconds = 0.0
        self.scored = 0
        self.scores: Scores | None = None
        self.best: dict[str, Any] | None = None

    @property
    def evaluated(self) -> Network:
        """The network whose predictions count: the teacher where there is one."""
        return self.teacher.model if self.teacher else self.network

    def describe(self) -> str:
        """Return in a few lines what is trained on what."""
        data, model = self.data, self.config.model
        background = "none" if data.background is None else data.classes[data.background]
        return (
            f"{self.config.method.name} on {len(data.labeled)} labelled and {len(data.unlabeled)} unlabelled pictures, "
            f"{len(data.val)} for validation, from {data.root} (layout {data.layout})\n"
            + (f"{len(data.tags)} pictures have tags\n" if data.tags else "")
            + f"{len(data.classes)} classes (background: {background}): {', '.join(data.classes)}\n"
            f"{model.arch} with {model.encoder_name} on {self.fabric.device}, {self.config.run.precision}"
        )

    def fit(self, stop: StopSignal) -> None:
        """Train to the last step, or until ``stop``, evaluating, logging and saving on the way."""
        run, steps = self.config.run, self.config.optim.steps
        started = time.monotonic() - self.seconds
        meter = Meter()
        unlabeled: Iterator[dict[str, Any]] | None = None
        # A stop skips the evaluation that is due, and a finished run has nothing else left to do.
        if self.step == steps or (self.step % run.eval_every == 0 and self.scored != self.step):
            self.evaluate()
            self.save(LAST)
        with tqdm(
            total=steps,
            initial=self.step,
            desc="train",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file keeps every line
        ) as bar:
            for labeled in labeled_loader(self.config, self.data, self.network, self.step):
                weight = self.config.method.consistency_weight(self.step)
                if weight and unlabeled is None:
                    unlabeled = iter(unlabeled_loader(self.config, self.data, self.network, self.step))
                batch = next(unlabeled) if weight and unlabeled else None
                self.corrupt.update([name for used in (labeled, batch) if used for name in used["corrupt"]])
                meter.add(self.training_step(labeled, batch, weight), labeled, batch)
                self.step += 1
                self.seconds = time.monotonic() - started
                bar.update()
                finished = self.step == steps
                due = self.step % run.eval_every == 0 or self.step % run.checkpoint_every == 0
                if due or self.step % run.log_every == 0 or finished or stop.received:
                    values = meter.read()
                    self.check_finite(values)
                    self.fabric.log_dict(
                        {**values, "lr": learning_rate(self.config.optim, self.step - 1)}, self.step
                    )
                    bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                if finished or (self.step % run.eval_every == 0 and not stop.received):
                    with meter.paused():
                        self.evaluate()
                    self.seconds = time.monotonic() - started
                stopping = stop.received  # read once: what stops has been saved, whenever the signal comes
                if self.step % run.checkpoint_every == 0 or finished or stopping:
                    self.save(LAST)
                if stopping:
                    break
        for log in self.fabric.loggers:
            log.finalize("success")

    def check_finite(self, losses: dict[str, float]) -> None:
        """Stop a run that has diverged before its weights are saved.

        Raises:
            RuntimeError: a loss is NaN or infinite.
        """
        wrong = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        if wrong:
            raise RuntimeError(
                f"{', '.join(wrong)} at step {self.step}: expected finite losses; lower optim.lr, lengthen "
                "optim.warmup, or try run.precision 32-true"
            )

    def training_step(
        self, labeled: dict[str, Any], unlabeled: dict[str, Any] | None, weight: float
    ) -> dict[str, Tensor]:
        """Take one step; return its loss terms as tensors on the device, so that nothing waits for them."""
        self.losses.train()
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, self.step))

        losses = self.losses(
            self.to_device(labeled), self.to_device(unlabeled) if unlabeled else None, weight
        )
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(sum(losses.values(), torch.zeros((), device=self.fabric.device)))
        self.optimizer.step()
        if self.teacher:
            self.teacher.update(self.network, self.step)
        return {name: loss.detach() for name, loss in losses.items()}

    def to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the tensors of a batch on the device, without waiting for them."""
        return {
            name: value.to(self.fabric.device, non_blocking=True)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }

    def evaluate(self) -> None:
        """Score the evaluated network on the val list, log it, and keep it if it is the best so far."""
        with self.fabric.autocast():
            self.scores = evaluate(
                self.evaluated,
                val_loader(self.config.data, self.data, self.config.model.in_channels),
                self.data.classes,
                align_corners=self.config.method.align_corners,
            )
        if self.scored != self.step:  # else a finished run shows its results again
            named = {
                f"IoU/{name}": iou for name, iou in zip(self.scores.classes, self.scores.iou, strict=True)
            }
            self.fabric.log_dict({"mIoU": self.scores.miou, **named}, self.step)
        self.scored = self.step
        improved = self.best is None or self.scores.miou > self.best["miou"]
        if improved:
            self.best = {"step": self.step, "miou": self.scores.miou, "iou": list(self.scores.iou)}
            self.save(BEST)
        tqdm.write(
            f"step {self.step}/{self.config.optim.steps}: mIoU {100 * self.scores.miou:.2f} %"
            + (", the best so far" if improved else "")
        )

    def save(self, name: str) -> None:
        """Write all that :meth:`restore` needs as the newest checkpoint, ``LAST``, or as the best, ``BEST``."""
        state = {
            "config": to_dict(self.config),
            "classes": self.data.classes,
            "background": self.data.background,
            "step": self.step,
            "scored": self.scored,
            "seconds": self.seconds,
            "best": self.best,
            "model": self.network.state_dict(),
            "teacher": self.teacher.model.state_dict() if self.teacher else None,
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        for log in self.fabric.loggers:  # a run that goes on from here has them up to here
            log.save()
        if name == LAST:
            save_last(self.checkpoints, state, self.config.run.keep)
        else:
            checkpoint.save(self.checkpoints / name, state)

    def restore(self, paths: Sequence[Path]) -> None:
        """Go on where the run that wrote the first whole one of ``paths`` was.

        Raises:
            ValueError: no checkpoint is whole, or it is of a run with another network, method or schedule.
        """
        path, state = load_first_whole(paths)
        ours = to_dict(self.config)
        differences = [
            f"{group}.{name}: {value} there, {ours[group].get(name)} here"
            for group in ("data", "model", "method", "optim", "run")
            for name, value in state["config"][group].items()
            if f"{group}.{name}" not in FREE_ON_RESUME and value != ours[group].get(name)
        ]
        if state["classes"] != self.data.classes:
            differences.append(f"classes: {state['classes']} there, {self.data.classes} here")
        if differences:
            raise ValueError(
                f"{path} is of a run with another configuration; resume with the same one "
                f"({path.parent.parent / 'config.yaml'}), or start anew:\n  " + "\n  ".join(differences)
            )
        self.network.load_state_dict(state["model"])
        if self.teacher:
            self.teacher.model.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.scored, self.seconds = state["step"], state["scored"], state["seconds"]
        self.best = self.kept_best()
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def kept_best(self) -> dict[str, Any] | None:
        """Return the score of this folder's ``BEST``, which may be newer than the checkpoint a run goes on from.

        Without a whole one, as in the new folder of a run that goes on from another, the best is chosen anew.
        """
        path = self.checkpoints / BEST
        try:
            return checkpoint.load(path)["best"]
        except FileNotFoundError:
            return None
        except ValueError as error:
            logger.warning("%s; the best is chosen anew", error)
            return None
