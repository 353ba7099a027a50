"""Train a network: ``python -m pseudoseg_fast.train --config PRESET_OR_FILE [--data.root DIR ...]``."""

from __future__ import annotations

import contextlib
import datetime
import signal
import sys
import time
from collections.abc import Iterator
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
from pseudoseg_fast.config import Config, parse_config, to_dict
from pseudoseg_fast.data.lists import DataError
from pseudoseg_fast.evaluate import Scores, evaluate
from pseudoseg_fast.loaders import Data, labeled_loader, read_data, unlabeled_loader, val_loader
from pseudoseg_fast.method import Teacher, labeled_losses, unlabeled_losses
from pseudoseg_fast.network import Network
from pseudoseg_fast.networks import build_network
from pseudoseg_fast.optim import learning_rate, make_optimizer, set_learning_rate
from pseudoseg_fast.sgc import image_labels_from_mask
from pseudoseg_fast.summary import write_summary


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
        tqdm.write("stopping after this step; once more stops at once, without a checkpoint", file=sys.stderr)


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
        self.fabric = Fabric(
            accelerator=config.run.accelerator,
            devices=1,
            precision=config.run.precision,
            loggers=[
                CSVLogger(folder, name="", version="log"),
                TensorBoardLogger(folder, name="", version="log"),
            ],
        )
        torch.manual_seed(config.run.seed)
        self.data: Data = read_data(config.data, unlabeled=config.method.name == "pseudoseg")
        network = build_network(config.model, len(self.data.classes), self.data.background)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.teacher = Teacher(network, config.method.ema) if config.method.ema else None
        self.network, self.optimizer = self.fabric.setup(network, make_optimizer(network, config.optim))
        if self.teacher:
            self.teacher.model.to(self.fabric.device)
        self.step = 0
        self.seconds = 0.0
        self.scores: Scores | None = None
        self.best: dict[str, Any] | None = None

    @property
    def evaluated(self) -> Network:
        """The network whose predictions count: the teacher where there is one."""
        return self.teacher.model if self.teacher else self.network.module

    def describe(self) -> str:
        """Return in a few lines what is trained on what."""
        data, model = self.data, self.config.model
        background = "none" if data.background is None else data.classes[data.background]
        return (
            f"{self.config.method.name} on {len(data.labeled)} labelled and {len(data.unlabeled)} unlabelled pictures, "
            f"{len(data.val)} for validation, from {data.root}\n"
            f"{len(data.classes)} classes (background: {background}): {', '.join(data.classes)}\n"
            f"{model.arch} with {model.encoder_name} on {self.fabric.device}, {self.config.run.precision}"
        )

    def fit(self, stop: StopSignal) -> None:
        """Train to the last step, or until ``stop``, evaluating, logging and saving on the way."""
        run, steps = self.config.run, self.config.optim.steps
        started = time.monotonic() - self.seconds
        meter = Meter()
        unlabeled: Iterator[dict[str, Any]] | None = None
        stride = self.network.stride
        with tqdm(total=steps, initial=self.step, desc="train", unit="step", dynamic_ncols=True) as bar:
            for labeled in labeled_loader(self.config, self.data, stride, self.step):
                weight = self.config.method.consistency_weight(self.step)
                if weight and unlabeled is None:
                    unlabeled = iter(unlabeled_loader(self.config, self.data, stride, self.step))
                batch = next(unlabeled) if weight and unlabeled else None
                meter.add(self.training_step(labeled, batch, weight), labeled, batch)
                self.step += 1
                self.seconds = time.monotonic() - started
                bar.update()
                last = self.step == steps or stop.received
                if self.step % run.log_every == 0 or last:
                    values = meter.read()
                    self.fabric.log_dict(
                        {**values, "lr": learning_rate(self.config.optim, self.step - 1)}, self.step
                    )
                    bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
                if not stop.received and (self.step % run.eval_every == 0 or last):
                    self.evaluate()
                    meter.pause()
                if self.step % run.checkpoint_every == 0 or last:
                    self.save("last.ckpt")
                self.seconds = time.monotonic() - started
                if stop.received:
                    return

    def training_step(
        self, labeled: dict[str, Any], unlabeled: dict[str, Any] | None, weight: float
    ) -> dict[str, Tensor]:
        """Take one step; return its loss terms as tensors on the device, so that nothing waits for them."""
        method = self.config.method
        device = self.fabric.device
        self.network.train()
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, self.step))

        masks = labeled["mask"].to(device)
        image_labels = image_labels_from_mask(masks, len(self.data.classes), self.data.background)
        outputs = self.network(
            labeled["image"].to(device),
            sgc=method.name == "pseudoseg",
            image_labels=image_labels,
            valid=labeled["valid"].to(device),
        )
        losses = labeled_losses(method, outputs, masks, image_labels)
        if unlabeled is not None:
            valid = unlabeled["valid"].to(device)
            tags = unlabeled["tags"].to(device) if method.image_labels else None
            with torch.no_grad():
                labeler = self.teacher.model if self.teacher else self.network
                with self.fabric.autocast():
                    weak = labeler(unlabeled["weak"].to(device), sgc=True, image_labels=tags, valid=valid)
            strong = self.network(unlabeled["strong"].to(device))
            losses |= unlabeled_losses(method, weight, strong, weak, valid, tags)
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(sum(losses.values(), torch.zeros((), device=device)))
        self.optimizer.step()
        if self.teacher:
            self.teacher.update(self.network.module, self.step)
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
                "seconds": self.seconds,
                "best": self.best,
                "model": self.network.module.state_dict(),
                "teacher": self.teacher.model.state_dict() if self.teacher else None,
                "optimizer": self.optimizer.state_dict(),
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
            for group in ("model", "method", "optim")
            for name, value in state["config"][group].items()
            if value != ours[group].get(name)
        ]
        if differences or state["classes"] != self.data.classes:
            differences = differences or [f"classes: {state['classes']} there, {self.data.classes} here"]
            raise ValueError(
                f"{path} is of a run with another configuration; resume with the same one "
                f"({path.parent.parent / 'config.yaml'}), or start anew:\n  " + "\n  ".join(differences)
            )
        self.network.module.load_state_dict(state["model"])
        if self.teacher:
            self.teacher.model.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], state["best"]
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])


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
        """Return the mean of each term, their sum and images/s, and begin again."""
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

    def pause(self) -> None:
        """Leave the time since the last reading out of the rate."""
        self.began = time.monotonic()


def run_folder(config: Config) -> tuple[Path, Path | None]:
    """Return the folder of the run and the checkpoint to go on with, if any.

    Raises:
        ValueError: the folder holds a run and nothing says what shall become of it, or there is nothing to resume.
    """
    run = config.run
    if run.dir is None:
        if run.resume == "auto":
            raise ValueError("run.resume auto needs to know the run: give --run.dir DIR")
        run.dir = f"runs/{config.method.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(run.dir)
    last = folder / "checkpoints" / "last.ckpt"
    if run.resume:
        path = last if run.resume == "auto" else Path(run.resume)
        if not path.is_file():
            raise ValueError(f"run.resume expects a checkpoint of a run, found no file {path}")
        return folder, path
    if (folder / "config.yaml").exists() and not run.overwrite:
        raise ValueError(
            f"{folder} already holds a run; go on with it: --run.resume auto, replace it: --run.overwrite true, "
            "or choose another --run.dir"
        )
    return folder, None


def train(config: Config) -> int:
    """Run ``config`` from its lists to its summary; return the process's exit status."""
    folder, resume = run_folder(config)
    trainer = Trainer(config, folder)
    if resume:
        trainer.restore(resume)
    folder.mkdir(parents=True, exist_ok=True)
    saved = to_dict(config)
    saved["run"] |= {"resume": None, "overwrite": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))
    print(trainer.describe())
    with StopSignal() as stop:
        trainer.fit(stop)
    if trainer.step < config.optim.steps:
        print(
            f"stopped after step {trainer.step} of {config.optim.steps}, all of it saved; to go on:\n"
            f"  python -m pseudoseg_fast.train --config {folder / 'config.yaml'} --run.resume auto"
        )
        return 130
    write_summary(trainer, folder)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input ends with a message and status 2."""
    prog = "python -m pseudoseg_fast.train"
    config = parse_config(sys.argv[1:] if arguments is None else arguments, prog, __doc__)
    try:
        return train(config)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
