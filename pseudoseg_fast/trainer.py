"""One run: its pictures, network, teacher and optimiser, the loop over them, and their checkpoints."""

from __future__ import annotations

import csv
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from pseudoseg_fast import checkpoint
from pseudoseg_fast.config import Config, choose_accelerator, to_dict
from pseudoseg_fast.data.dataset import CorruptCounter
from pseudoseg_fast.data.sets import Data, read_data
from pseudoseg_fast.evaluate import Scores, evaluate
from pseudoseg_fast.examples import Examples
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader, val_loader
from pseudoseg_fast.method import Teacher, class_weights
from pseudoseg_fast.network import Network
from pseudoseg_fast.networks import build_network
from pseudoseg_fast.optim import learning_rate, make_optimizer, set_learning_rate
from pseudoseg_fast.progress import Progress, say
from pseudoseg_fast.step import StepLosses
from pseudoseg_fast.stop import StopSignal

FREE_ON_RESUME = {
    *("data.root", "data.workers", "data.cache"),
    *("run.dir", "run.resume", "run.overwrite", "run.accelerator"),
    *("run.eval_every", "run.draw_every", "run.checkpoint_every", "run.log_every"),
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
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.csv_log = CSVLogger(folder, name="", version="log", flush_logs_every_n_steps=1)
        self.tensorboard = TensorBoardLogger(folder, name="", version="log")
        self.fabric = Fabric(
            accelerator=choose_accelerator(config.run.accelerator),
            devices=1,
            precision=config.run.precision,
            loggers=[self.csv_log, self.tensorboard],
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
        self.examples = Examples(config, self.data, network)
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
        unlabeled: Iterator[dict[str, Any]] | None = None
        # A stop skips the evaluation that is due, and a finished run has nothing else left to do.
        if self.step == steps or (self.step % run.eval_every == 0 and self.scored != self.step):
            self.evaluate()
            self.save("last.ckpt")
        with Progress(steps, self.step, self.fabric.device) as progress:
            for labeled in labeled_loader(self.config, self.data, self.network, self.step):
                weight = self.config.method.consistency_weight(self.step)
                if weight and unlabeled is None:
                    unlabeled = iter(unlabeled_loader(self.config, self.data, self.network, self.step))
                batch = next(unlabeled) if weight and unlabeled else None
                self.corrupt.update([name for used in (labeled, batch) if used for name in used["corrupt"]])
                progress.add(self.training_step(labeled, batch, weight), labeled, batch)
                self.step += 1
                self.seconds = time.monotonic() - started
                finished = self.step == steps
                due = self.step % run.eval_every == 0 or self.step % run.checkpoint_every == 0
                if due or self.step % run.log_every == 0 or finished or stop.received:
                    values = progress.read()
                    self.check_finite(values)
                    values |= {"lr": learning_rate(self.config.optim, self.step - 1), "seconds": self.seconds}
                    self.fabric.log_dict(
                        {f"train/{name}": value for name, value in values.items()}, self.step
                    )
                    say(progress.line(values))
                if finished or (self.step % run.eval_every == 0 and not stop.received):
                    with progress.paused():
                        self.evaluate()
                    self.seconds = time.monotonic() - started
                stopping = stop.received  # read once: what stops has been saved, whenever the signal comes
                if self.step % run.checkpoint_every == 0 or finished or stopping:
                    self.save("last.ckpt")
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
        """Score the evaluated network on the val list, log it, draw, and keep it if it is the best so far."""
        began = time.monotonic()
        with self.fabric.autocast():
            self.scores = evaluate(
                self.evaluated,
                val_loader(self.config.data, self.data, self.config.model.in_channels),
                self.data.classes,
                align_corners=self.config.method.align_corners,
            )
        self.scored = self.step
        named = {
            f"eval/{name}_IoU": iou for name, iou in zip(self.scores.classes, self.scores.iou, strict=True)
        }
        self.fabric.log_dict({"eval/mIoU": self.scores.miou, **named}, self.step)
        improved = self.best is None or self.scores.miou > self.best["miou"]
        if improved:
            self.best = {"step": self.step, "miou": self.scores.miou, "iou": list(self.scores.iou)}
            self.save("best.ckpt")
        say(
            f"step {self.step}/{self.config.optim.steps}: mIoU {100 * self.scores.miou:.2f} %"
            + (", the best so far" if improved else "")
            + f"; evaluated in {time.monotonic() - began:.1f} s"
        )
        if self.examples.due(self.step):
            with self.fabric.autocast():
                self.examples.publish(self.evaluated, self.folder, self.step, self.tensorboard)

    def save(self, name: str) -> None:
        """Write all that :meth:`restore` needs."""
        checkpoint.save(
            self.checkpoints / name,
            {
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
            },
        )

    def restore(self, path: Path) -> None:
        """Go on where the run that wrote ``path`` was.

        Raises:
            ValueError: the checkpoint is damaged, or of a run with another network, method or schedule.
        """
        state = checkpoint.load(path)
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
        self.best = state["best"]
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])

    def continue_log(self) -> None:
        """Take over what the log in the folder holds up to this step; the logger alone would delete it."""
        path = Path(self.csv_log.log_dir, "metrics.csv")
        if not path.is_file():
            return
        with path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) <= self.step]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory .* is not empty")
            for row in rows:
                step = int(row.pop("step"))
                self.csv_log.log_metrics({name: float(value) for name, value in row.items() if value}, step)
