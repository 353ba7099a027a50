"""Processes: how many a run has, on what, and how they agree."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pseudoseg_fast.config import RunConfig, choose_accelerator
from pseudoseg_fast.network import Network

Result = TypeVar("Result")

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: for the one that reads a large data set or draws the summary, too."""


def processes(devices: int | str) -> tuple[int, int]:
    """Return how many processes a node has, and how many nodes there are.

    What started this process knows best: torchrun, or srun of SLURM; without them it is what ``devices`` says.

    Args:
        devices: processes to start on this machine, or "auto" for one.

    Raises:
        ValueError: ``devices`` contradicts torchrun or srun.
    """
    if TorchElasticEnvironment.detect():
        launcher, world = "torchrun", int(os.environ["WORLD_SIZE"])
        node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    elif SLURMEnvironment.detect():
        launcher, world = "srun", int(os.environ["SLURM_NTASKS"])
        node = world // int(os.environ.get("SLURM_NNODES", 1))
    else:
        return (1 if devices == "auto" else int(devices)), 1
    if devices not in ("auto", node):
        raise ValueError(
            f"run.devices is {devices}, but {launcher} started {node} processes on this node; leave the option out"
        )
    return node, world // node


def make_fabric(run: RunConfig) -> Fabric:
    """Return the launched Fabric of a run: from here on every process of it executes the same code.

    Raises:
        ValueError: the machine has not the devices that are asked for.
    """
    devices, nodes = processes(run.devices)
    accelerator = choose_accelerator(run.accelerator)
    if accelerator == "cuda" and torch.cuda.device_count() < devices:
        raise ValueError(
            f"{devices} processes on this node need a GPU each, found {torch.cuda.device_count()}; lower run.devices, "
            "torchrun's --nproc-per-node or SLURM's --ntasks-per-node, and let every task see all GPUs of its node "
            "(--gpus-per-node, not --gpus-per-task)"
        )
    strategy: Any = "auto"
    if devices * nodes > 1:
        # Running statistics are averaged once a step, see average_batch_norms, not copied before every pass.
        known = inspect.signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        strategy = DDPStrategy(gradient_as_bucket_view=True, timeout=TIMEOUT, **options)
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        precision=run.precision,
        strategy=strategy,
    )
    fabric.launch()
    return fabric


def end_processes(fabric: Fabric, *, failed: bool) -> None:
    """End what :func:`make_fabric` began: wait for the processes that this one started, or end them if it failed.

    Without a word from it they would wait for ever. What torchrun or srun started they end themselves.
    """
    for child in getattr(fabric.strategy.launcher, "procs", []):
        if failed:
            child.kill()
        child.wait()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def reduce(fabric: Fabric, tensor: Tensor, how: str) -> Tensor:
    """Return the "sum" or "mean" of a tensor over processes."""
    reduced = fabric.all_reduce(tensor, reduce_op=how)
    assert isinstance(reduced, Tensor)
    return reduced


def from_first(fabric: Fabric, function: Callable[[], Result]) -> Result:
    """Return what ``function`` returns in the first process, in all of them.

    Raises:
        ValueError, OSError: what it raised there, in all of them.
    """
    answer: tuple[Any, Exception | None] = (None, None)
    if fabric.is_global_zero:
        try:
            answer = (function(), None)
        except (ValueError, OSError) as error:
            answer = (None, error)
    result, failure = fabric.broadcast(answer)
    if failure is not None:
        raise failure
    return result


def gather(fabric: Fabric, value: Any) -> list[Any]:
    """Return every process's value, by rank."""
    if fabric.world_size == 1:
        return [value]
    values: list[Any] = [None] * fabric.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def average_batch_norms(fabric: Fabric, network: nn.Module) -> None:
    """Replace the running statistics of batch norms by their mean over processes; synchronised ones have it already."""
    if fabric.world_size == 1:
        return
    buffers = [
        buffer
        for module in network.modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
        for buffer in module.buffers()
        if buffer.is_floating_point()
    ]
    if not buffers:
        return
    flat = reduce(fabric, torch.cat(buffers), "mean")
    for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(mean)


def freeze_unused(network: Network, size: int) -> None:
    """Freeze the parameters that no output depends on, such as an encoder's last norm: gradients wait for all others.

    Args:
        network: on the CPU; stays as it is but for ``requires_grad``.
        size: side of the images that it will see.
    """
    with torch.random.fork_rng(devices=[]):
        probe = copy.deepcopy(network)
        side = -(-size // network.stride) * network.stride
        outputs = probe(torch.zeros(2, network.in_channels, side, side), sgc=True)
        maps = [outputs.decoder_logits, outputs.class_logits, outputs.sgc_logits]
        sum(part.sum() for part in maps if part is not None).backward()
    for ours, theirs in zip(network.parameters(), probe.parameters(), strict=True):
        ours.requires_grad_(ours.requires_grad and theirs.grad is not None)


class Agreement:
    """Lets the processes of a run decide together whether to stop: all do at the same step if one of them wants to.

    They talk on the CPU while the device computes, so that it never waits for them.

    Args:
        fabric: of the run.
    """

    def __init__(self, fabric: Fabric) -> None:
        self.group: Any = torch.distributed.new_group(backend="gloo") if fabric.world_size > 1 else None
        self.wish = torch.zeros((), dtype=torch.int32)
        self.work: Any = None

    def ask(self, wish: bool) -> None:
        """Tell the others what this process wants, without waiting for them."""
        if self.group is not None:
            self.wish.fill_(wish)
            self.work = torch.distributed.all_reduce(
                self.wish, torch.distributed.ReduceOp.MAX, group=self.group, async_op=True
            )

    def answer(self, wish: bool) -> bool:
        """Return what any process wanted when it was asked; a process alone has its ``wish`` of this moment."""
        if self.group is None:
            return wish
        self.work.wait()
        return bool(self.wish)

    def now(self, wish: bool) -> bool:
        """Ask, and wait for the answer."""
        self.ask(wish)
        return self.answer(wish)


def shares(fabric: Fabric, denominators: Tensor) -> Tensor:
    """Return what to multiply local means by, so that their mean over processes and sum over passes is the whole's.

    Each process averages a loss over pixels of its own, and gradients are averaged over processes: where the numbers of
    pixels differ, that mean of means is not the mean.

    Args:
        fabric: of the run.
        denominators: [passes, terms] what each local mean divides by.
    """
    total = reduce(fabric, denominators.sum(0), "sum")
    return (denominators * fabric.world_size / total.clamp(min=torch.finfo(total.dtype).tiny)).float()
