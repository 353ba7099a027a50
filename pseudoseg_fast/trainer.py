"""One run: its pictures, network, teacher and optimiser, the loop over them, and their checkpoints."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from timm.layers import convert_sync_batchnorm
from torch import Tensor

from pseudoseg_fast import checkpoint
from pseudoseg_fast.batches import Batches, check_norms, check_sizes
from pseudoseg_fast.config import Config
from pseudoseg_fast.csv_log import CsvLog
from pseudoseg_fast.data.dataset import MAX_UNREADABLE, CorruptCounter
from pseudoseg_fast.data.sampler import mix
from pseudoseg_fast.data.sets import Data, read_data
from pseudoseg_fast.data.stream import Stream
from pseudoseg_fast.depthwise import use_depthwise_kernels
from pseudoseg_fast.distributed import (
    Agreement,
    freeze_unused,
    from_first,
    gather,
    make_fabric,
    reduce,
)
from pseudoseg_fast.event_log import EventLog
from pseudoseg_fast.examples import Examples
from pseudoseg_fast.finite import NotFinite
from pseudoseg_fast.kept import BEST, FORMER_BEST, LAST, load_first_whole, save_last
from pseudoseg_fast.loaders import labeled_loader, tag_frequency, unlabeled_loader, val_loader
from pseudoseg_fast.memory import peak_memory
from pseudoseg_fast.method import class_weights
from pseudoseg_fast.network import Network
from pseudoseg_fast.networks import build_network
from pseudoseg_fast.optim import learning_rate, make_optimizer
from pseudoseg_fast.progress import Progress, say
from pseudoseg_fast.run_folder import is_own
from pseudoseg_fast.run_state import (
    SHARES,
    fingerprints,
    generator_states,
    restore_state,
    scored_alike,
    set_generator_states,
    state_of,
)
from pseudoseg_fast.scoring import Scores, evaluate
from pseudoseg_fast.step import StepLosses
from pseudoseg_fast.stepper import Stepper
from pseudoseg_fast.stop import StopSignal
from pseudoseg_fast.teacher import Teacher
from pseudoseg_fast.warm_start import start_from

logger = logging.getLogger(__name__)


def check_start(config: Config) -> None:
    """Refuse a run of PseudoSeg that would never see an unlabelled batch.

    Raises:
        ValueError: it would not.
    """
    if config.method.name == "supervised":
        return
    start, steps = config.method.start_u, config.optim.steps
    if not config.method.weight_u:
        raise ValueError(
            "with method.weight_u 0 no step uses unlabelled pictures, expected more than 0; or say "
            "--method.name supervised"
        )
    if start >= steps:
        raise ValueError(
            f"expected method.start_u, the first step that uses unlabelled pictures, below optim.steps, got {start} "
            f"and {steps}; lower it, such as to {2 * steps // 5}, or say --method.name supervised"
        )


class Trainer:
    """One run: its pictures, network, teacher and optimiser, and the loop over them.

    Args:
        config: the resolved configuration.
        folder: where the run writes its log and checkpoints.
        fabric: of the run's processes; None starts them.
        pretrained: load the weights that the configuration begins with, ``model.init`` or the encoder's; a run that is
            restored gets its own instead.

    Raises:
        DataError, ValueError, RuntimeError: pictures, network or weights are not what the configuration says.
    """

    def __init__(
        self, config: Config, folder: Path, fabric: Fabric | None = None, *, pretrained: bool = True
    ) -> None:
        check_start(config)
        self.config = config
        self.pretrained = pretrained
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.csv_log = CsvLog(folder / "log" / "metrics.csv")
        self.fabric = fabric or make_fabric(config.run)
        self.tensorboard = EventLog(folder, name="", version="log")
        self.fabric.loggers.extend([self.csv_log, self.tensorboard])
        self.rank = {"rank": self.fabric.global_rank, "world_size": self.fabric.world_size}
        torch.manual_seed(config.run.seed)
        with self.fabric.rank_zero_first():
            self.data: Data = read_data(config.data, unlabeled=config.method.name == "pseudoseg")
        self.lists = fingerprints(self.data)
        self.shares_of = dict.fromkeys(SHARES, config.optim.steps)
        self.network = self.build()
        # Made again when training begins; what they refuse is refused before the folder is touched.
        labeled_loader(config, self.data, self.network, 0)
        if self.data.unlabeled:
            unlabeled_loader(config, self.data, self.network, 0)
        val = val_loader(config.data, self.data, self.network.in_channels)
        check_sizes(self.network, config, val.dataset[0]["image"])
        self.teacher = Teacher(self.network, config.method.ema) if config.method.ema else None
        if config.run.compile:
            self.compile()
        device = self.fabric.device
        weights = class_weights(config.method, self.data.pixels)
        losses = StepLosses(
            self.network,
            config.method,
            self.teacher.model.to(device) if self.teacher else None,
            None if weights is None else weights.to(device),
            tag_frequency(self.data).to(device) if self.data.tags else None,
        )
        self.losses, self.optimizer = self.fabric.setup(losses, make_optimizer(self.network, config.optim))
        self.stepper = Stepper(config, self.fabric, self.network, self.teacher, self.losses, self.optimizer)
        if self.fabric.global_rank:
            torch.manual_seed(mix(config.run.seed, self.fabric.global_rank))  # for what is drawn in a step
        self.corrupt = CorruptCounter(self.data.pictures, MAX_UNREADABLE / self.fabric.world_size)
        self.examples = Examples(config, self.data, self.network)
        self.step = 0
        self.seconds = 0.0
        self.scored = 0
        self.scores: Scores | None = None
        self.best: dict[str, Any] | None = None
        self.replaced = False

    def build(self) -> Network:
        """Return the network, on the CPU."""
        model, classes = self.config.model, self.data.classes
        pretrained = self.pretrained and model.init is None
        network = build_network(model, len(classes), self.data.background, pretrained=pretrained)
        if self.pretrained and model.init is not None:
            start = start_from(network, model, classes, model.init)
            if self.fabric.is_global_zero:
                logger.log(logging.WARNING if start.changed or not start.kept else logging.INFO, "%s", start)
        network.to(memory_format=torch.channels_last)
        use_depthwise_kernels(network, self.fabric.device)
        if self.fabric.world_size > 1:
            freeze_unused(network, self.config.data.crop_size)
        sync = self.config.run.sync_batchnorm
        on_gpu = self.fabric.device.type == "cuda"
        if sync is True and not on_gpu:
            raise ValueError("run.sync_batchnorm is for GPUs alone; leave it on auto")
        if on_gpu and sync is not False and self.fabric.world_size > 1:
            return convert_sync_batchnorm(network)  # timm's, which knows norms with an activation
        check_norms(network, self.config)  # synchronised ones see the pictures of all processes
        return network

    def compile(self) -> None:
        """Compile what costs most, encoder and decoder, of the network and its teacher, for the sizes of the steps."""
        for network in [self.network, *([self.teacher.model] if self.teacher else [])]:
            network.features = torch.compile(network.features)  # type: ignore[method-assign]

    @property
    def evaluated(self) -> Network:
        """The network whose predictions count: the teacher where there is one."""
        return self.teacher.model if self.teacher else self.network

    def describe(self) -> str:
        """Return in a few lines what is trained on what."""
        data, model, optim = self.data, self.config.model, self.config.optim
        sizes = [optim.batch_size]
        if self.config.method.name == "pseudoseg":
            sizes.append(optim.unlabeled_batch_size or optim.batch_size)
        batch = " + ".join(str(size * optim.accumulate * self.fabric.world_size) for size in sizes)
        background = "none" if data.background is None else data.classes[data.background]
        unused = "" if self.config.method.image_labels else ", unused: --config tagged learns from them"
        return (
            f"{self.config.method.name} on {len(data.labeled)} labelled and {len(data.unlabeled)} unlabelled pictures, "
            f"{len(data.val)} for validation, from {data.root} (layout {data.layout})\n"
            + (f"{len(data.tags)} pictures have tags{unused}\n" if data.tags else "")
            + f"{len(data.classes)} classes (background: {background}): {', '.join(data.classes)}\n"
            f"{model.arch} with {model.encoder_name} on {self.fabric.device}, {self.config.run.precision}\n"
            f"{optim.steps} steps of {batch} pictures, crops of {self.config.data.crop_size} pixels"
        )

    def fit(self, stop: StopSignal) -> None:
        """Train to the last step, or until ``stop``, evaluating, logging and saving on the way.

        Raises:
            NotFinite: a step was not sound; nothing of it was saved.
            OutOfMemory: memory has run out; the message says which batch fits.
        """
        status = "failed"
        try:
            self.take_steps(stop)
            status = "success"
        finally:
            for log in self.fabric.loggers:
                log.finalize(status)

    def take_steps(self, stop: StopSignal) -> None:
        """Do what :meth:`fit` does, but for the end of the logs."""
        run, steps = self.config.run, self.config.optim.steps
        started = time.monotonic() - self.seconds
        began = self.step
        labeled = iter(labeled_loader(self.config, self.data, self.network, self.step, **self.rank))
        unlabeled: Iterator[dict[str, Any]] | None = None
        agreement = Agreement(self.fabric)
        # A stop skips the evaluation that is due, and a finished run has nothing else left to do.
        if began == steps and self.fabric.is_global_zero:
            logger.warning(
                "the checkpoint is of step %d, the last one: nothing is left to train; give more --optim.steps to go "
                "on, or leave --run.resume out to begin anew",
                steps,
            )
        if self.step == steps or (self.step % run.eval_every == 0 and self.scored != self.step):
            self.stepper.check_weights(self.step)
            self.evaluate()
            self.save(LAST)
        with Progress(steps, self.step, shown=self.fabric.is_global_zero) as progress:
            while self.step < steps:
                agreement.ask(stop.received)
                if self.step == began + 1 and self.rehearses:  # the optimiser's state is there by now
                    with progress.paused():
                        self.rehearse()
                weight = self.config.method.consistency_weight(self.step)
                if weight and unlabeled is None:
                    unlabeled = iter(
                        unlabeled_loader(self.config, self.data, self.network, self.step, **self.rank)
                    )
                batches = self.next_batches(labeled, unlabeled if weight else None)
                losses = self.training_step(batches, weight)
                progress.add(losses, *(batch for pair in batches for batch in pair))
                self.step += 1
                self.seconds = time.monotonic() - started
                finished = self.step == steps
                evaluating = finished or self.step % run.eval_every == 0
                # While steps are left out, the weights may be what makes them unsound: older ones are not given up.
                due = self.step % run.checkpoint_every == 0 and not self.stepper.skipped
                saving = finished or due
                stopping = agreement.answer(stop.received)
                if evaluating or saving or stopping or self.step % run.log_every == 0:
                    # Nothing of a step that is not sound is evaluated or saved.
                    self.stepper.check_steps(self.step)
                    if evaluating:
                        self.check_progress(self.step - began)
                    values = self.mean_over_processes(progress.read()) | {
                        "lr": learning_rate(self.config.optim, self.step - 1),
                        "seconds": self.seconds,
                        "memory_MiB": peak_memory(self.fabric.device),
                    }
                    if run.nonfinite == "skip":
                        values["skipped_steps"] = self.stepper.skipped_steps
                    self.fabric.log_dict(
                        {f"train/{name}": value for name, value in values.items()}, self.step
                    )
                    progress.show(values)
                if evaluating or saving or stopping:
                    self.stepper.check_weights(self.step)
                if saving or stopping:
                    self.save(LAST)  # before an evaluation, which may fail; a run goes on from here with that
                if finished or (evaluating and not stopping):
                    with progress.paused():
                        self.evaluate()
                    self.seconds = time.monotonic() - started
                    # Read once: what stops has been saved, whenever the signal comes.
                    stopping = agreement.now(stop.received)
                    if saving or stopping:
                        self.save(LAST)
                if stopping:
                    break

    def check_progress(self, taken: int) -> None:
        """Look whether there is anything to evaluate after so many steps of this process.

        Raises:
            NotFinite: all steps since the last evaluation were left out; a single one may be, but for the last of all.
        """
        every = self.config.run.eval_every
        interval = min(self.step % every or every, taken)
        last = self.step == self.config.optim.steps and interval == taken
        if self.stepper.skipped >= interval and (interval > 1 or last):
            raise NotFinite(
                f"step {self.step}: none of the last {interval} steps was sound, all were left out"
            )

    def mean_over_processes(self, values: dict[str, float]) -> dict[str, float]:
        """Return losses as the mean over processes, and rates as their sum."""
        world = self.fabric.world_size
        if world == 1:
            return values
        means = reduce(self.fabric, torch.tensor(list(values.values()), dtype=torch.float64), "mean").tolist()
        return {
            name: mean * world if name == "images_per_second" else mean
            for name, mean in zip(values, means, strict=True)
        }

    def next_batches(
        self, labeled: Iterator[dict[str, Any]], unlabeled: Iterator[dict[str, Any]] | None
    ) -> list[Batches]:
        """Return the batches of a step, one pair for each pass, and count their unreadable pictures."""
        passes = range(self.config.optim.accumulate)
        batches: list[Batches] = [
            (next(labeled), next(unlabeled) if unlabeled is not None else None) for _ in passes
        ]
        self.corrupt.update(
            [name for pair in batches for batch in pair if batch for name in batch["corrupt"]]
        )
        return batches

    @property
    def rehearses(self) -> bool:
        """Whether a GPU's memory could run out hours into the run, when unlabelled pictures come.

        A stream's are not drawn for that: it cannot be read twice for nothing.
        """
        method = self.config.method
        later = method.name == "pseudoseg" and self.step < method.start_u
        return self.fabric.device.type == "cuda" and later and not isinstance(self.data.unlabeled, Stream)

    def rehearse(self) -> None:
        """Make the passes of a step with unlabelled pictures; leave all as it was, but for the memory that they need.

        Raises:
            OutOfMemory: memory has run out; the message says which batch fits.
        """
        config = dataclasses.replace(self.config, data=dataclasses.replace(self.config.data, workers=0))
        states = generator_states()
        labeled, unlabeled = (
            next(iter(load(config, self.data, self.network, self.step, **self.rank)))
            for load in (labeled_loader, unlabeled_loader)
        )
        method = self.config.method
        self.stepper.rehearse(int(method.start_u) + 1, (labeled, unlabeled), method.weight_u)
        set_generator_states(states)

    def training_step(self, batches: Sequence[Batches], weight: float) -> dict[str, Tensor]:
        """Take one step and return its loss terms, see :meth:`Stepper.take`.

        Args:
            batches: labelled and unlabelled batch of each pass.
            weight: of L_u.
        """
        return self.stepper.take(self.step, batches, weight)

    def evaluate(self) -> None:
        """Score the evaluated network on the val list, log it, draw, and keep it if it is the best so far."""
        began = time.monotonic()
        self.stepper.release()  # what recorded passes hold is not there for anything else
        with self.fabric.autocast(), torch.compiler.set_stance("force_eager"):
            try:
                self.scores = evaluate(
                    self.evaluated,
                    val_loader(self.config.data, self.data, self.config.model.in_channels, **self.rank),
                    self.data.classes,
                    align_corners=self.config.method.align_corners,
                    total=lambda counts: reduce(self.fabric, counts, "sum"),
                )
            except NotFinite as error:  # if it is the weights, the next steps will say so
                self.scores = Scores.unknown(self.data.classes)
                if self.fabric.is_global_zero:
                    logger.warning("step %d is not scored: %s", self.step, error)
        seconds = time.monotonic() - began
        if self.scored != self.step:  # else a finished run shows its results again
            named = {
                f"eval/{name}_IoU": iou
                for name, iou in zip(self.scores.classes, self.scores.iou, strict=True)
            }
            self.fabric.log_dict({"eval/mIoU": self.scores.miou, **named}, self.step)
        self.scored = self.step
        # A NaN, of pictures without a labelled pixel, is better than nothing and worse than anything else.
        improved = self.best is None or self.scores.miou > self.best["miou"] or math.isnan(self.best["miou"])
        if improved:
            self.best = {"step": self.step, "miou": self.scores.miou, "iou": list(self.scores.iou)}
            if self.replaced and self.fabric.is_global_zero:
                (self.checkpoints / BEST).replace(self.checkpoints / FORMER_BEST)
            self.replaced = False
            self.save(BEST)
        if self.fabric.is_global_zero:
            say(
                f"step {self.step}/{self.config.optim.steps}: mIoU {100 * self.scores.miou:.2f} %"
                + (", the best so far" if improved else "")
                + f"; evaluated in {seconds:.1f} s"
            )
            if self.examples.due(self.step):
                with self.fabric.autocast(), torch.compiler.set_stance("force_eager"):
                    self.examples.publish(self.evaluated, self.folder, self.step, self.tensorboard)

    def save(self, name: str) -> None:
        """Write all that :meth:`restore` needs as the newest checkpoint, ``LAST``, or as the best, ``BEST``.

        The first process alone does.
        """
        generators = gather(self.fabric, generator_states())
        if not self.fabric.is_global_zero:
            return
        state = state_of(self, generators)
        for log in self.fabric.loggers:  # a run that goes on from here has them up to here
            log.save()
        if name == LAST:
            save_last(self.checkpoints, state, self.config.run.keep)
        else:
            checkpoint.save(self.checkpoints / name, state)

    def restore(self, paths: Sequence[Path]) -> Path:
        """Go on where the run that wrote the first whole one of ``paths`` was; return which it is.

        Raises:
            ValueError: no checkpoint is whole, or it is of a run with another network or method.
        """
        loaded: list[dict[str, Any]] = []

        def choose() -> Path:
            path, state = load_first_whole(paths)
            loaded.append(state)
            return path

        path = from_first(self.fabric, choose)
        restore_state(self, path, loaded[0] if loaded else checkpoint.load(path))
        check_start(self.config)  # of fewer steps than it had
        if self.config.model.init and self.fabric.is_global_zero:
            logger.info("the run goes on from %s: model.init was for its start", path)
        own = is_own(self.folder, path)
        if not own:  # nor is the log of another folder copied
            self.scored = 0
        # The best of another folder is not copied, so here it is chosen anew.
        self.best, self.replaced = from_first(self.fabric, self.kept_best) if own else (None, False)
        if self.replaced:  # what is there already is a candidate, too
            self.scored = 0
        return path

    def kept_best(self) -> tuple[dict[str, Any] | None, bool]:
        """Return the score of this folder's ``BEST``, which may be newer than the checkpoint a run goes on from.

        None where there is none that compares with the scores from here on: the best is chosen anew then. And whether
        there is one that does not compare, and is to be kept by another name.
        """
        try:
            state = checkpoint.load(self.checkpoints / BEST)
        except FileNotFoundError:
            return None, False
        except ValueError as error:
            logger.warning("%s; the best is chosen anew", error)
            return None, False
        if scored_alike(state, self.lists, self.config.data):
            return state["best"], False
        logger.warning("the best is chosen anew, and the one so far is kept as %s", FORMER_BEST)
        return None, True
