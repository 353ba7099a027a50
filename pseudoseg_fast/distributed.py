"""Processes: how many a run has, on what, and how they agree."""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pseudoseg_fast.children import children_of
from pseudoseg_fast.config import RunConfig, choose_accelerator
from pseudoseg_fast.network import Network

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)
"""How long a process waits for the others: for the one that reads a large data set or draws the summary, too."""


SPECIAL_STEPS = 0xFFFFFFF0
"""From here on SLURM's step ids are of what srun did not start, such as batch scripts and interactive shells."""


def launcher() -> str | None:
    """Return what started this process and its peers, "torchrun" or "srun"; None for a command of its own.

    In a job's script or shell, too, ``SLURM_NTASKS`` and ``SLURM_PROCID`` are set; only srun's processes have a step.
    """
    if TorchElasticEnvironment.detect():
        return "torchrun"
    step = os.environ.get("SLURM_STEP_ID", "")
    alone = os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1"
    shell = alone and "SLURM_PTY_PORT" in os.environ  # which what srun starts from such a shell inherits
    started = step.isdecimal() and int(step) < SPECIAL_STEPS and not shell
    return "srun" if started and SLURMEnvironment.detect() else None


def processes(devices: int | str) -> tuple[int, int]:
    """Return how many processes a node has, and how many nodes there are.

    What started this process knows best: torchrun, or srun of SLURM; without them it is what ``devices`` says.

    Args:
        devices: processes to start on this machine, or "auto" for one.

    Raises:
        ValueError: ``devices`` contradicts torchrun or srun.
    """
    started_by = launcher()
    if started_by == "torchrun":
        world = int(os.environ["WORLD_SIZE"])
        node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    elif started_by == "srun":
        world = int(os.environ["SLURM_NTASKS"])
        node = world // int(os.environ.get("SLURM_NNODES", 1))
    else:
        tasks = int(os.environ.get("SLURM_NTASKS", 1))
        if devices == "auto" and tasks > 1:
            logger.warning(
                "SLURM has room for %d tasks, this is one process: start it with srun to use them all", tasks
            )
        return (1 if devices == "auto" else int(devices)), 1
    if devices not in ("auto", node):
        raise ValueError(
            f"run.devices is {devices}, but {started_by} started {node} processes on this node; leave the option out"
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
    if accelerator == "cpu" and run.precision == "16-mixed":
        raise ValueError("run.precision 16-mixed is for GPUs; on the CPU bf16-mixed is half precision")
    strategy: Any = "auto"
    if devices * nodes > 1:
        if TorchElasticEnvironment.detect():
            join(accelerator)
        # Running statistics are averaged once a step, see average_batch_norms, not copied before every pass.
        known = inspect.signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {
            "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
        }
        strategy = DDPStrategy(gradient_as_bucket_view=True, timeout=TIMEOUT, **options)
    # Fabric would take it for one of srun's processes.
    alone = launcher() is None and SLURMEnvironment.detect()
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        precision=run.precision,
        strategy=strategy,
        plugins=[LightningEnvironment()] if alone else None,
    )
    fabric.launch()
    return fabric


def join(accelerator: str) -> None:
    """Make the process group of torchrun's processes, which Fabric then finds made.

    Between restarts torchrun keeps the store in which processes leave their addresses, so that one may read that of a
    process which has died, and wait for it. So all first agree on a word that none of a former start knows, and leave
    their addresses under it.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store: Any = torch.distributed.TCPStore(
        host, port, world, is_master=rank == 0 and not kept, timeout=TIMEOUT
    )
    store = torch.distributed.PrefixStore(meet(store, rank, world), store)
    device = None
    if accelerator == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(
        "nccl" if device else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
        device_id=device,
    )


def meet(store: Any, rank: int, world: int) -> str:
    """Return a word that all processes of this start have, and none of a former one.

    Everyone leaves a nonce and, again and again, the digest of all nonces that it sees. A nonce of a former start is in
    no digest but its own start's, so where all digests are the same, all nonces are of this start.
    """
    store.set(f"nonce/{rank}", uuid.uuid4().hex)
    nonces, digests = ([f"{name}/{other}" for other in range(world)] for name in ("nonce", "digest"))
    while True:
        word = hashlib.sha256(b"".join(store.multi_get(nonces))).hexdigest()
        store.set(f"digest/{rank}", word)
        if set(store.multi_get(digests)) == {word.encode()}:
            return word
        time.sleep(0.05)


def end_processes(fabric: Fabric, *, failed: bool) -> None:
    """End what :func:`make_fabric` began: wait for the processes that this one started, or end them if it failed.

    Without a word from it they would wait for ever. What torchrun or srun started they end themselves. A process that
    failed leaves its group as it is: to leave it in order it would have to wait for the others, and they for it.
    """
    for child in children_of(fabric):
        if failed:
            child.kill()
        child.wait()
    if not failed and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def is_child(fabric: Fabric) -> bool:
    """Tell whether the first process of this machine started this one, and takes a status other than 0 for a crash."""
    environment = getattr(fabric.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and not fabric.is_global_zero


def check_same_options(fabric: Fabric, options: dict[str, Any]) -> None:
    """Refuse processes that were given different options, which would wait for each other or train different networks.

    Args:
        fabric: of the run.
        options: those that must be the same, by name.

    Raises:
        ValueError: in all processes; the message names the options.
    """
    theirs = gather(fabric, options)
    different = [
        f"{name}: {', '.join(dict.fromkeys(str(given[name]) for given in theirs))}"
        for name in options
        if any(given[name] != theirs[0][name] for given in theirs)
    ]
    if different:
        raise ValueError("all processes expect the same options, got\n  " + "\n  ".join(different))


def reduce(fabric: Fabric, tensor: Tensor, how: str) -> Tensor:
    """Return the "sum" or "mean" of a tensor over processes; unlike Fabric's own it has no barrier first."""
    if fabric.world_size == 1:
        return tensor
    reduced = tensor.to(fabric.device, copy=True)
    torch.distributed.all_reduce(reduced)
    return reduced / fabric.world_size if how == "mean" else reduced


def from_first(fabric: Fabric, function: Callable[[], Result]) -> Result:
    """Return what ``function`` returns in the first process, in all of them.

    Raises:
        Exception: what it raised there, in all of them.
    """
    answer: tuple[Any, Exception | None] = (None, None)
    if fabric.is_global_zero:
        try:
            answer = (function(), None)
        except Exception as error:  # whatever it is, the others wait for an answer
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
    probe = copy.deepcopy(network)
    side = -(-size // network.stride) * network.stride
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes alone: nothing is computed, nothing drawn
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
