"""What is a training step made of, and how does it compare with the loop that research repositories write?

CAMVID=FOLDER CCP=FOLDER python -m pytest bench/test_train_step.py --threads 2

Times whole steps, without reading pictures, and what in them is not the network: the loss path, everything from the
network's outputs to their gradients, and the update, from the gradients to new weights and their average. The same is
done with ``bench.research_loop``, with PyTorch's own operations instead of the kernels, and with ``run.compile``. Sets
that are not part of the project are found through the environment and skipped without; --benchmark-json FILE keeps the
figures.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from bench.memory import extra_bytes
from bench.protocols import write_voc
from bench.research_loop import research_loss, research_step, research_update
from pseudoseg_fast import backends
from pseudoseg_fast.backends import eager
from pseudoseg_fast.batches import to_device
from pseudoseg_fast.config import Config, parse_config
from pseudoseg_fast.finite import sound
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader
from pseudoseg_fast.memory import keep_freed_memory
from pseudoseg_fast.method import labeled_losses, unlabeled_losses
from pseudoseg_fast.network import Outputs
from pseudoseg_fast.sgc import image_labels_from_mask
from pseudoseg_fast.step import single
from pseudoseg_fast.trainer import Trainer

LITE0 = (
    "--config small --model.encoder_name tf_efficientnet_lite0 --model.encoder_weights null "
    "--data.classes classes.txt --data.val splits/val.txt --data.workers 0 --optim.batch_size 4 "
)
CAMVID = LITE0 + "--data.labeled splits/1_8/labeled.txt --data.unlabeled splits/1_8/unlabeled.txt"
VOC = "--config voc12 --run.precision 32-true --model.encoder_weights null --data.workers 0"
RUNS = {
    "demo": "--config demo",
    "demo_4": "--config demo --optim.batch_size 4",
    "demo_16": "--config demo --optim.batch_size 16",
    "camvid": CAMVID,
    "camvid_full_label": CAMVID + " --method.label_size crop",
    "ccp": LITE0 + "--data.labeled splits/50/labeled.txt --data.unlabeled splits/50/unlabeled.txt",
    "voc_321_2_cpu": f"{VOC} --data.crop_size 321 --optim.batch_size 2",
    **{
        f"voc_{crop}_{batch}_gpu": f"{VOC} --data.crop_size {crop} --optim.batch_size {batch}"
        for crop in (321, 513)
        for batch in (4, 8, 16)
    },
}
MADE_UP = "voc"
"""Runs whose pictures are made up, of VOC's size."""
AMP = "--run.precision bf16-mixed"
LAUNCHED = "--run.cuda_graphs false"
LOOPS = {
    "research": "",
    "eager": LAUNCHED,
    "auto": "",
    "launched": LAUNCHED,
    "compile": "--run.compile true",
    "research_amp": AMP,
    "auto_amp": AMP,
    "launched_amp": f"{AMP} {LAUNCHED}",
    "joint_amp": f"{AMP} --method.joint true",
    "compile_amp": f"{AMP} --run.compile true",
}


def configuration(run: str, loop: str, device: str, folder: Path) -> Config:
    """Return the configuration of a run, or skip the test if its pictures are not there or it is of another device."""
    options = f"{RUNS[run]} {LOOPS[loop]} --run.accelerator {device}"
    if run.endswith("_gpu") != (device == "cuda") and run.startswith(MADE_UP):
        pytest.skip(f"not for {device}")
    if loop.endswith("_amp") and device == "cpu":
        pytest.skip("half precision is for GPUs")
    if loop == "launched" and device == "cpu":
        pytest.skip("graphs are for GPUs: on a CPU all is launched")
    name = run.split("_")[0]
    if name == MADE_UP:
        root, lists = write_voc(folder / "voc", pictures=16)
        options += f" --data.root {root} {lists}"
    elif name != "demo":
        if name.upper() not in os.environ:
            pytest.skip(f"needs {name.upper()}, the folder of that set")
        options += f" --data.root {os.environ[name.upper()]}"
    return parse_config(options.split(), "bench", "")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def leaf(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor as an input of the loss path."""
    return None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)


def median_seconds(call: Callable[[], object]) -> float:
    """Return the median time of a call after one to warm up."""
    call()
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=2).median)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("run", RUNS)
def test_step(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, run: str, loop: str
) -> None:
    """Time the network, the loss path and whole steps of a run, and measure the peak of memory of a launched step."""
    config = configuration(run, loop, device, tmp_path)
    keep_freed_memory()  # as training does
    if loop == "eager" or loop.startswith("research"):
        monkeypatch.setattr(backends, "BACKENDS", {"eager": eager})
    trainer = Trainer(config, tmp_path / "run")
    fresh = next(iter(labeled_loader(config, trainer.data, trainer.network, 0)))
    labeled = to_device(fresh, trainer.fabric.device)
    unlabeled = next(iter(unlabeled_loader(config, trainer.data, trainer.network, 0)))
    unlabeled = to_device(unlabeled, trainer.fabric.device)
    # As batches come from the loader, for the trainer; on the device already, as the research loop has them.
    pair = ({**labeled, "name": fresh["name"]}, {**unlabeled, "name": fresh["name"]})
    if loop.startswith("research"):
        amp = torch.bfloat16 if loop.endswith("_amp") else None
        whole = partial(research_step, trainer, labeled, unlabeled, amp)
    else:
        whole = partial(trainer.training_step, [pair], 1.0)

    def step() -> None:
        whole()
        synchronize()

    step()
    extra = extra_bytes(lambda: (step(), ())[1], device)
    research = loop.startswith("research")
    benchmark.group = run
    benchmark.extra_info.update(
        run=run,
        loop=loop,
        images=len(labeled["image"]) + len(unlabeled["weak"]),
        crop=config.data.crop_size,
        loss_path_seconds=median_seconds(loss_path(trainer, labeled, unlabeled, research)),
        update_seconds=median_seconds(partial(update, trainer, research)),
        peak_bytes=extra,
    )
    benchmark.pedantic(step, rounds=8, warmup_rounds=1)


def update(trainer: Trainer, research: bool) -> None:
    """Do what a step does with gradients: look at them, move the weights and their average."""
    if research:
        research_update(trainer)
    else:
        sound({"L_s": torch.zeros((), device=trainer.fabric.device)}, trainer.network.parameters())
        trainer.optimizer.step()
        if trainer.teacher:
            trainer.teacher.update(trainer.network, 0)
    synchronize()


def loss_path(
    trainer: Trainer, labeled: dict[str, Tensor], unlabeled: dict[str, Tensor], research: bool
) -> Callable[[], None]:
    """Return what computes the losses of a step and their gradients, from outputs of the network."""
    method, network = trainer.config.method, trainer.network.train()
    masks, valid = labeled["mask"], unlabeled["valid"][:, 0]
    tags = unlabeled["tags"] if method.image_labels else None
    present = image_labels_from_mask(masks, network.classes, network.background)
    with trainer.fabric.autocast():
        ours = Outputs(*map(leaf, single(network(labeled["image"], sgc=True, image_labels=present))))
        strong = Outputs(*map(leaf, single(network(unlabeled["strong"][:, 0]))))
        with torch.no_grad():
            weak = single(network(unlabeled["weak"], sgc=True, image_labels=tags, valid=valid))

    def compute() -> None:
        if research:
            total = research_loss(method, ours, strong, weak, masks, present, valid)
        else:
            losses = labeled_losses(method, ours, masks, present, tagged=tags is not None)
            losses |= unlabeled_losses(method, 1.0, strong, weak, valid, tags)
            total = sum(losses.values(), torch.zeros((), device=masks.device))
        inputs = [maps for maps in (*ours, *strong) if maps is not None and maps.requires_grad]
        torch.autograd.grad(total, inputs, allow_unused=True)
        synchronize()

    return compute


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
