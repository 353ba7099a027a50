"""Train a network: ``python -m pseudoseg_fast.train --config PRESET_OR_FILE [--data.root DIR ...]``."""

from __future__ import annotations

import csv
import logging
import math
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from tqdm import tqdm

from pseudoseg_fast import checkpoint
from pseudoseg_fast.config import Config, choose_accelerator, parse_config, to_dict
from pseudoseg_fast.data.dataset import CorruptCounter
from pseudoseg_fast.data.sets import Data, read_data
from pseudoseg_fast.evaluate import Scores, evaluate
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader, val_loader
from pseudoseg_fast.memory import keep_freed_memory
from pseudoseg_fast.method import (
    Teacher,
    class_weights,
    cut_mix,
    exclude_untagged,
    labeled_losses,
    unlabeled_losses,
)
from pseudoseg_fast.network import Network
from pseudoseg_fast.networks import build_network
from pseudoseg_fast.optim import learning_rate, make_optimizer, set_learning_rate
from pseudoseg_fast.run_folder import clear_folder, run_folder
from pseudoseg_fast.sgc import image_labels_from_mask
from pseudoseg_fast.summary import write_summary

FREE_ON_RESUME = {
    *("data.root", "data.workers", "data.cache"),
    *("run.dir", "run.resume", "run.overwrite", "run.accelerator"),
    *("run.eval_every", "run.checkpoint_every", "run.log_every"),
}
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a wish that the loop grants between two steps; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> StopSignal:
        self.former = {
            number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; called by the interpreter."""
        if self.received:
            raise KeyboardInterrupt
        self.received = True
        # Not through sys.stderr: the signal may have come while that was being written to.
        os.write(2, b"\nstopping after this step; once more stops at once, without a checkpoint\n")


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
        self.csv_log = CSVLogger(folder, name="", version="log", flush_logs_every_n_steps=1)
        self.fabric = Fabric(
            accelerator=choose_accelerator(config.run.accelerator),
            devices=1,
            precision=config.run.precision,
            loggers=[self.csv_log, TensorBoardLogger(folder, name="", version="log")],
        )
        torch.manual_seed(config.run.seed)
        self.data: Data = read_data(config.data, unlabeled=config.method.name == "pseudoseg")
        weights = class_weights(config.method, self.data.pixels)
        self.class_weight = None if weights is None else weights.to(self.fabric.device)
        network = build_network(config.model, len(self.data.classes), self.data.background)
        network.to(memory_format=torch.channels_last)
        self.teacher = Teacher(network, config.method.ema) if config.method.ema else None
        self.network = network
        self.model, self.optimizer = self.fabric.setup(network, make_optimizer(network, config.optim))
        if self.teacher:
            self.teacher.model.to(self.fabric.device)
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
            self.save("last.ckpt")
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
        method = self.config.method
        device = self.fabric.device
        self.model.train()
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, self.step))

        masks = labeled["mask"].to(device)
        image_labels = image_labels_from_mask(masks, len(self.data.classes), self.data.background)
        outputs = self.model(
            labeled["image"].to(device),
            sgc=method.name == "pseudoseg",
            image_labels=image_labels,
            valid=labeled["valid"].to(device),
        )
        tagged = unlabeled is not None and method.image_labels
        losses = labeled_losses(
            method, outputs, masks, image_labels, tagged=tagged, class_weight=self.class_weight
        )
        if unlabeled is not None:
            valid = unlabeled["valid"].to(device)
            tags = unlabeled["tags"].to(device) if method.image_labels else None
            with torch.no_grad():
                labeler = self.teacher.model if self.teacher else self.model
                with self.fabric.autocast():
                    weak = labeler(unlabeled["weak"].to(device), sgc=True, image_labels=tags, valid=valid)
            if method.exclude_untagged and tags is not None:
                weak = exclude_untagged(weak, tags, self.data.background)
            images = unlabeled["strong"].to(device)
            if float(torch.rand(())) < method.cutmix:
                images, weak, valid = cut_mix(images, weak, valid, self.network.stride)
            strong = self.model(images)
            losses |= unlabeled_losses(method, weight, strong, weak, valid, tags)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(sum(losses.values(), torch.zeros((), device=device)))
        self.optimizer.step()
        if self.teacher:
            self.teacher.update(self.network, self.step)
        return {name: loss.detach() for name, loss in losses.items()}

    def evaluate(self) -> None:
        """Score the evaluated network on the val list, log it, and keep it if it is the best so far."""
        with self.fabric.autocast():
            self.scores = evaluate(
                self.evaluated,
                val_loader(self.config.data, self.data, self.config.model.in_channels),
                self.data.classes,
                align_corners=self.config.method.align_corners,
            )
        self.scored = self.step
        named = {f"IoU/{name}": iou for name, iou in zip(self.scores.classes, self.scores.iou, strict=True)}
        self.fabric.log_dict({"mIoU": self.scores.miou, **named}, self.step)
        improved = self.best is None or self.scores.miou > self.best["miou"]
        if improved:
            self.best = {"step": self.step, "miou": self.scores.miou, "iou": list(self.scores.iou)}
            self.save("best.ckpt")
        tqdm.write(
            f"step {self.step}/{self.config.optim.steps}: mIoU {100 * self.scores.miou:.2f} %"
            + (", the best so far" if improved else "")
        )

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


class Meter:
    """Means of loss terms and the rate of pictures since it was last read."""

    def __init__(self) -> None:
        self.losses: list[dict[str, Tensor]] = []
        self.pictures = 0
        self.began = time.monotonic()

    def add(self, losses: dict[str, Tensor], *batches: dict[str, Any] | None) -> None:
        """Count one step."""
        self.losses.append(losses)
        self.pictures += sum(len(batch["name"]) for batch in batches if batch)

    def read(self) -> dict[str, float]:
        """Return the mean of each term and images/s, and begin again."""
        names = list(dict.fromkeys(name for losses in self.losses for name in losses))
        means = {
            name: torch.stack([losses[name] for losses in self.losses if name in losses]).mean()
            for name in names
        }
        values = {name: float(mean) for name, mean in means.items()}
        values["images/s"] = self.pictures / max(1e-9, time.monotonic() - self.began)
        self.losses, self.pictures = [], 0
        self.began = time.monotonic()
        return values

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside out of the rate."""
        began = time.monotonic()
        yield
        self.began += time.monotonic() - began


def train(config: Config) -> int:
    """Run ``config`` from its lists to its summary; return the process's exit status."""
    folder, resume = run_folder(config)
    trainer = Trainer(config, folder)
    if resume:
        trainer.restore(resume)
    if resume and resume.resolve().parent == trainer.checkpoints.resolve():
        trainer.continue_log()
    else:
        trainer.best = None  # best.ckpt of another folder is not copied, so the best is chosen anew
        if config.run.overwrite:
            clear_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved = to_dict(config)
    saved["run"] |= {"resume": None, "overwrite": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    print(trainer.describe())
    if trainer.fabric.device.type == "cpu":
        keep_freed_memory()
    with StopSignal() as stop:
        trainer.fit(stop)
    if trainer.step < config.optim.steps:
        print(
            f"stopped after step {trainer.step} of {config.optim.steps}, all of it saved; to go on:\n"
            f"  python -m pseudoseg_fast.train --config {shlex.quote(str(folder / 'config.yaml'))} --run.resume auto"
        )
        return INTERRUPTED
    with trainer.fabric.autocast():
        write_summary(trainer, folder)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input ends with a message and status 2."""
    prog = "python -m pseudoseg_fast.train"
    config = parse_config(sys.argv[1:] if arguments is None else arguments, prog, __doc__)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("pseudoseg_fast").setLevel(logging.INFO)
    try:
        return train(config)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (ValueError, RuntimeError, OSError) as error:
        logging.getLogger(__name__).debug("traceback", exc_info=True)
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
