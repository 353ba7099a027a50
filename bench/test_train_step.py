"""How much of a training step is the loss path? Times both with PyTorch's own operations and with the kernels.

CAMVID=FOLDER CCP=FOLDER python -m pytest bench/test_train_step.py --threads 2

The loss path is everything from the network's outputs to their gradients: losses, fusion of the pseudo label, resizing.
It is timed alone, on the outputs of a real batch; the step is a whole one, without reading pictures. Sets that are not
part of the project are found through the environment and skipped without; --benchmark-json FILE keeps the figures.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from pseudoseg_fast import backends
from pseudoseg_fast.backends import eager
from pseudoseg_fast.config import Config, parse_config
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader
from pseudoseg_fast.memory import keep_freed_memory
from pseudoseg_fast.method import labeled_losses, unlabeled_losses
from pseudoseg_fast.network import Outputs
from pseudoseg_fast.sgc import image_labels_from_mask
from pseudoseg_fast.trainer import Trainer

LITE0 = (
    "--config small --model.encoder_name tf_efficientnet_lite0 --model.encoder_weights null "
    "--data.classes classes.txt --data.val splits/val.txt --data.workers 0 --optim.batch_size 4 "
)
RUNS = {
    "demo": "--config demo",
    "camvid": LITE0 + "--data.labeled splits/1_8/labeled.txt --data.unlabeled splits/1_8/unlabeled.txt",
    "camvid_full_label": LITE0
    + "--data.labeled splits/1_8/labeled.txt --data.unlabeled splits/1_8/unlabeled.txt --method.label_size crop",
    "ccp": LITE0 + "--data.labeled splits/50/labeled.txt --data.unlabeled splits/50/unlabeled.txt",
}
BACKENDS = ("eager", "auto")


def configuration(run: str, device: str) -> Config:
    """Return the configuration of a run, or skip the test if its pictures are not there."""
    options = f"{RUNS[run]} --run.accelerator {device}"
    name = run.split("_")[0].upper()
    if name != "DEMO":
        if name not in os.environ:
            pytest.skip(f"needs {name}, the folder of that set")
        options += f" --data.root {os.environ[name]}"
    return parse_config(options.split(), "bench", "")


@pytest.fixture
def only_eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return what leaves eager as the one backend."""
    return lambda: monkeypatch.setattr(backends, "BACKENDS", {"eager": eager})


def leaf(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor as an input of the loss path."""
    return None if tensor is None else tensor.detach().requires_grad_(tensor.requires_grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("run", RUNS)
def test_step(
    benchmark: Any, tmp_path: Path, device: str, only_eager: Callable[[], None], run: str, backend: str
) -> None:
    """Time the loss path, then steps of a run."""
    keep_freed_memory()  # as training does
    if backend == "eager":
        only_eager()
    config = configuration(run, device)
    trainer = Trainer(config, tmp_path)
    method = config.method
    labeled = next(iter(labeled_loader(config, trainer.data, trainer.network, 0)))
    unlabeled = next(iter(unlabeled_loader(config, trainer.data, trainer.network, 0)))
    masks, valid = (
        tensor.to(trainer.fabric.device) for tensor in (labeled["mask"], unlabeled["valid"][:, 0])
    )
    tags = unlabeled["tags"].to(masks.device) if method.image_labels else None
    image_labels = image_labels_from_mask(masks, len(trainer.data.classes), trainer.data.background)
    model = trainer.network.train()
    ours = Outputs(*map(leaf, model(labeled["image"].to(masks.device), sgc=True, image_labels=image_labels)))
    strong = Outputs(*map(leaf, model(unlabeled["strong"][:, 0].to(masks.device))))
    with torch.no_grad():
        weak = model(unlabeled["weak"].to(masks.device), sgc=True, image_labels=tags, valid=valid)

    def loss_path() -> None:
        losses = labeled_losses(method, ours, masks, image_labels, tagged=tags is not None)
        losses |= unlabeled_losses(method, 1.0, strong, weak, valid, tags)
        inputs = [maps for maps in (*ours, *strong) if maps is not None and maps.requires_grad]
        torch.autograd.grad(sum(losses.values(), torch.zeros(())), inputs, allow_unused=True)
        synchronize()

    def step() -> None:
        trainer.training_step([(labeled, unlabeled)], 1.0)
        synchronize()

    loss_path()
    timer = Timer("loss_path()", globals={"loss_path": loss_path}, num_threads=torch.get_num_threads())
    benchmark.group = run
    benchmark.extra_info.update(
        run=run,
        backend=backend,
        images=len(labeled["name"]) + len(unlabeled["name"]),
        crop=config.data.crop_size,
        loss_path_seconds=timer.blocked_autorange(min_run_time=2).median,
    )
    benchmark.pedantic(step, rounds=8, warmup_rounds=2)


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
