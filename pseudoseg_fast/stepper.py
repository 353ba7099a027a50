"""The steps of a run: gradients of their passes, and what to do with a step that is not sound or does not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from lightning_fabric import Fabric
from lightning_fabric.wrappers import _FabricModule
from torch import Tensor
from torch.optim import Optimizer

from pseudoseg_fast.batches import Batches, to_device, what_fits
from pseudoseg_fast.config import Config
from pseudoseg_fast.data.lists import shorten
from pseudoseg_fast.distributed import average_batch_norms, reduce, shares
from pseudoseg_fast.finite import EXPLODED, NotFinite, Watch, all_finite, sound, unsound
from pseudoseg_fast.graphs import LAUNCHED, Graphs, record_graph
from pseudoseg_fast.memory import OutOfMemory, is_out_of_memory
from pseudoseg_fast.method import MethodConfig
from pseudoseg_fast.network import Network
from pseudoseg_fast.optim import learning_rate, set_learning_rate
from pseudoseg_fast.pseudo_labels import draw_boxes
from pseudoseg_fast.step import TERMS, StepLosses
from pseudoseg_fast.teacher import Teacher

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

MAX_SKIPPED = 20
"""Steps in succession that may be left out for not being sound."""


class Stepper:
    """Takes steps: a batch or several in, new weights and their moving average out, or the step left out.

    Args:
        config: of the run.
        fabric: of its processes.
        network: learns.
        teacher: its moving average, if there is one.
        losses: turns the batches of a pass into loss terms, :class:`~pseudoseg_fast.step.StepLosses` as set up.
        optimizer: of the network's parameters, as set up.
    """

    def __init__(
        self,
        config: Config,
        fabric: Fabric,
        network: Network,
        teacher: Teacher | None,
        losses: _FabricModule,
        optimizer: Optimizer,
    ) -> None:
        self.config = config
        self.fabric = fabric
        self.network = network
        self.teacher = teacher
        self.losses = losses
        self.optimizer = optimizer
        self.graphs: Graphs | None = None
        if records(config, fabric):
            self.graphs = Graphs(self._pass, network.parameters(), self._record)
        self.watch = Watch(limits(config.method))
        self.skipped = 0
        """Steps left out in succession, up to the last."""
        self.skipped_steps = 0
        """Steps left out in the whole run."""

    def take(self, step: int, batches: Sequence[Batches], weight: float) -> dict[str, Tensor]:
        """Take a step; return its loss terms as tensors on the device, so that nothing waits for them.

        A step that is left out for not being sound has no terms.

        Args:
            step: how many were taken before.
            batches: labelled and unlabelled batch of each pass.
            weight: of L_u.

        Raises:
            NotFinite: an earlier step, or on the CPU this one, was not sound.
            OutOfMemory: memory has run out; the message says which batch fits.
        """

        def attempt(batches: Sequence[Batches]) -> dict[str, Tensor]:
            return self._take(step, batches, weight)

        return self._if_it_fits(attempt, batches, f"at step {step + 1}")

    def rehearse(self, step: int, pair: Batches, weight: float) -> None:
        """Make the gradient of a step, for the memory that it needs; of the run only random generators move on.

        Args:
            step: which is rehearsed, counted from 1.
            pair: batches that stand for those of every pass.
            weight: of L_u.

        Raises:
            OutOfMemory: memory has run out; the message says which batch fits.
        """
        buffers = self._buffers()
        self.losses.train()
        passes = self.config.optim.accumulate
        if self.graphs:
            passes = max(passes, LAUNCHED + 1)  # with one that is recorded
        self._if_it_fits(
            lambda batches: self._accumulate(batches, weight),
            [pair] * passes,
            f"in a rehearsal of step {step}",
        )
        self.release()
        self._forget(buffers)

    def release(self) -> None:
        """Give back the memory of recorded passes until the next is recorded."""
        if self.graphs:
            self.graphs.release()

    def check_steps(self, step: int) -> None:
        """Look at the steps that are still under way, and at the scale that 16-mixed multiplies gradients by.

        Args:
            step: how many were taken.

        Raises:
            NotFinite: one was not sound, or gradients overflow at any scale.
        """
        self.watch.check()
        scaler = getattr(self.fabric.strategy.precision, "scaler", None)
        if scaler is not None and scaler.get_scale() < 1:
            raise NotFinite(
                f"step {step}: gradients are not finite at any scale that half precision was tried with"
            )

    def check_weights(self, step: int) -> None:
        """Look at all that a checkpoint is good for: a step may have left it not finite although its loss was.

        Args:
            step: how many were taken.

        Raises:
            NotFinite: in all processes: weights, running statistics or their moving average are not finite.
        """
        tensors = dict(self.network.state_dict())
        if self.teacher:
            tensors |= {f"teacher.{name}": value for name, value in self.teacher.model.state_dict().items()}
        if not self._everywhere(all_finite(tensors.values())):
            wrong = [name for name, value in tensors.items() if not value.isfinite().all()]
            raise NotFinite(
                f"step {step}: weights or running statistics are not finite; no checkpoint holds them:\n"
                + shorten(wrong or ["those of another process"])
            )

    def _take(self, step: int, batches: Sequence[Batches], weight: float) -> dict[str, Tensor]:
        """Do what :meth:`take` does where memory suffices."""
        self.losses.train()
        set_learning_rate(self.optimizer, learning_rate(self.config.optim, step))
        skip = self.config.run.nonfinite == "skip"
        buffers = self._buffers() if skip else []
        losses, largest = self._accumulate(batches, weight)
        checked = None if self.config.run.precision == "16-mixed" else self.network.parameters()
        flags = self._everywhere(sound(largest, checked, self.watch.limits))
        names = [name for pair in batches for batch in pair if batch for name in batch["name"]]
        if skip and not flags.all():
            self._skip(unsound(step + 1, names, largest, flags, self.watch.limits))
            self._forget(buffers)
            return {}
        self.skipped = 0
        self.watch.add(step + 1, names, largest, flags)
        self.optimizer.step()
        average_batch_norms(self.fabric, self.network)
        if self.teacher:
            self.teacher.update(self.network, step)
        return losses

    def _if_it_fits(
        self, attempt: Callable[[Sequence[Batches]], Result], batches: Sequence[Batches], when: str
    ) -> Result:
        """Return what ``attempt`` does with batches.

        Raises:
            OutOfMemory: memory has run out; the message says ``when``, and which batch fits.
        """
        try:
            return attempt(batches)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).split("\n")[0]
        # Here the failed attempt's tensors are free: the error held on to them.
        trial = None if self.fabric.world_size > 1 else lambda pair: attempt([pair] * len(batches))
        remedy = what_fits(batches[0], self.config, trial)
        raise OutOfMemory(f"out of memory {when}, {remedy} ({reason})")

    def _accumulate(
        self, batches: Sequence[Batches], weight: float
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Leave the gradient of a step in the parameters.

        Returns:
            The loss terms of the whole step, and the largest of any of its passes, each over pixels of its own.
        """
        device = self.fabric.device
        moved = [
            (to_device(labeled, device), to_device(self._mixed(unlabeled), device) if unlabeled else None)
            for labeled, unlabeled in batches
        ]
        share: list[Tensor | None] = [None] * len(moved)
        if len(moved) * self.fabric.world_size > 1:
            module = cast(StepLosses, self.losses.module)
            share = [*shares(self.fabric, torch.stack([module.denominators(*pair) for pair in moved]))]
        self._zero_grad()
        total: dict[str, Tensor] = {}
        largest: dict[str, Tensor] = {}
        for index, pair in enumerate(moved):
            with self.fabric.no_backward_sync(self.losses, enabled=index < len(moved) - 1):
                make = self.graphs or self._pass
                means, losses = make(*pair, weight, share[index])
            for name, loss in losses.items():
                total[name] = total[name] + loss if name in total else loss
                largest[name] = torch.maximum(largest[name], means[name]) if name in largest else means[name]
        return total, largest

    def _pass(
        self,
        labeled: dict[str, Tensor],
        unlabeled: dict[str, Tensor] | None,
        weight: float | Tensor,
        share: Tensor | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add the gradient of a pass; return its loss terms, over pixels of its own and as shares of the step."""
        means = self.losses(labeled, unlabeled, 1.0)
        # Multiplied out here: Fabric would round an argument to the precision of the forward pass.
        if "L_u" in means:
            means["L_u"] = means["L_u"] * weight
        losses = weigh(means, share)
        self.fabric.backward(sum(losses.values(), torch.zeros((), device=self.fabric.device)))
        return detached(means), detached(losses)

    def _record(self, call: Callable[[], object]) -> Callable[[], None]:
        """Record a pass, in which the teacher works out anew what it keeps of its weights."""
        if self.teacher:
            self.teacher.model.eval()  # forgets, see Teacher.update
        return record_graph(call)

    def _mixed(self, unlabeled: dict[str, Any]) -> dict[str, Any]:
        """Return an unlabelled batch with what CutMix draws, which is drawn on the CPU and so in no graph."""
        if not self.config.method.cutmix:
            return unlabeled
        boxes = draw_boxes(unlabeled["strong"], self.network.stride, self.config.method.cutmix)
        return unlabeled | {"boxes": boxes.pin_memory() if self.fabric.device.type == "cuda" else boxes}

    def _zero_grad(self) -> None:
        """Forget the gradient, which a graph has at fixed places."""
        self.optimizer.zero_grad(set_to_none=self.graphs is None or self.graphs.replay is None)

    def _everywhere(self, flags: Tensor) -> Tensor:
        """Return which flags are true in all processes, which so stop, or skip, at the same step."""
        return flags if self.fabric.world_size == 1 else reduce(self.fabric, flags.float(), "mean") == 1

    def _skip(self, error: NotFinite) -> None:
        """Count a step that is left out.

        Raises:
            NotFinite: too many in succession were.
        """
        self.skipped += 1
        self.skipped_steps += 1
        if self.skipped > MAX_SKIPPED:
            raise NotFinite(f"{self.skipped} steps in succession; {error}", pictures=error.pictures)
        logger.warning("skipped %s", error)

    def _buffers(self) -> list[Tensor]:
        """Return copies of what a forward pass changes: running statistics."""
        return [buffer.clone() for buffer in self.network.buffers()]

    def _forget(self, buffers: Sequence[Tensor]) -> None:
        """Forget a step that is not taken: its gradient, and its running statistics for the former ``buffers``."""
        for buffer, former in zip(self.network.buffers(), buffers, strict=True):
            buffer.copy_(former)
        self._zero_grad()


def records(config: Config, fabric: Fabric) -> bool:
    """Tell whether passes are recorded: not where other processes, a compiler or a changing scale take part."""
    run = config.run
    alone = fabric.device.type == "cuda" and fabric.world_size == 1
    possible = alone and not run.compile and run.precision != "16-mixed"
    if run.cuda_graphs is True and not possible:
        logger.warning(
            "run.cuda_graphs is for one process with a GPU, without run.compile and in 32-true or bf16-mixed: passes "
            "are launched one by one"
        )
    return possible and run.cuda_graphs is not False


def detached(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return losses without their derivatives."""
    return {name: loss.detach() for name, loss in losses.items()}


def limits(method: MethodConfig) -> dict[str, float]:
    """Return above which value each loss term is no training, see :data:`~pseudoseg_fast.finite.EXPLODED`."""
    weights = (1.0, method.weight_dice, method.weight_sa, method.weight_x, method.weight_u)
    return {name: EXPLODED * max(1.0, weight) for name, weight in zip(TERMS, weights, strict=True)}


def weigh(losses: dict[str, Tensor], share: Tensor | None) -> dict[str, Tensor]:
    """Return loss terms times their shares, see :func:`~pseudoseg_fast.distributed.shares`; None changes nothing."""
    if share is None:
        return losses
    return {name: loss * share[TERMS.index(name)] for name, loss in losses.items()}
