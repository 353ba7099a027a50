"""From the configuration to the pictures of a run and the batches of a step."""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tvf

from pseudoseg_fast.augment import WeakStrongViews, WeakView
from pseudoseg_fast.config import Config, DataConfig, choose_accelerator
from pseudoseg_fast.data.dataset import SegmentationDataset, collate
from pseudoseg_fast.data.demo import demo_root
from pseudoseg_fast.data.lists import DataError, Sample, read_classes, read_list, read_tags, read_unlabeled
from pseudoseg_fast.data.read import check_masks
from pseudoseg_fast.data.sampler import StepSampler, mix
from pseudoseg_fast.network import Network
from pseudoseg_fast.sgc import foreground_classes

DEMO = "demo"
EVAL_BATCH = 8


@dataclass(frozen=True)
class Data:
    """The pictures of a run.

    Args:
        root: folder that the lists' paths start from.
        classes: names in the order of their ids.
        background: id of the background class, or None.
        val: pictures with masks to evaluate on.
        labeled: pictures with masks to learn from.
        unlabeled: pictures to learn from without masks.
        tags: classes of tagged pictures, by the picture's name.
    """

    root: Path
    classes: list[str]
    background: int | None
    val: list[Sample]
    labeled: list[Sample]
    unlabeled: list[Sample]
    tags: dict[str, set[str]]


def read_data(config: DataConfig, *, labeled: bool = True, unlabeled: bool = True) -> Data:
    """Read the lists that a configuration names and check that their pictures are there and their masks fit.

    Args:
        config: names of the lists.
        labeled: read the labelled list, too; not needed to evaluate.
        unlabeled: read the unlabelled list and the tags, too.

    Raises:
        DataError: a list, picture or mask is missing or does not fit; the message names it.
    """
    root = demo_root() if config.root == DEMO else Path(config.root)
    if not root.is_dir():
        raise DataError(
            f"data.root expects a folder, or {DEMO} for the embedded data set; there is no folder {root}"
        )
    classes = read_classes(config.classes, root)
    data = Data(
        root=root,
        classes=classes,
        background=background_class(config.background, classes),
        val=read_list(config.val, root),
        labeled=read_list(config.labeled, root) if labeled else [],
        unlabeled=read_unlabeled(config.unlabeled, root) if unlabeled and config.unlabeled else [],
        tags=read_tags(config.tags, classes, root) if unlabeled and config.tags else {},
    )
    if data.tags and data.tags.keys().isdisjoint(sample.name for sample in data.unlabeled):
        raise DataError(
            f"{config.tags} tags no picture of {config.unlabeled}: its names must be those of the list, such as "
            f"{data.unlabeled[0].name}, got {next(iter(data.tags))}"
        )
    check_masks([*data.labeled, *data.val], len(classes), config.ignore_index)
    return data


def background_class(background: int | str | None, classes: Sequence[str]) -> int | None:
    """Return the id of the background class; "auto" looks for a class of the name background.

    Raises:
        DataError: there is no class of that id.
    """
    if isinstance(background, str):
        return classes.index("background") if "background" in classes else None
    if background is not None and not 0 <= background < len(classes):
        raise DataError(
            f"data.background expects a class id from 0 to {len(classes) - 1}, auto or null, got {background}"
        )
    return background


class WithTags:
    """Adds ``tags`` [K] to a sample: 1 for each class that its picture is tagged with, all NaN for one without tags."""

    def __init__(self, data: Data) -> None:
        self.tags = data.tags
        self.classes = [
            data.classes[index] for index in foreground_classes(len(data.classes), data.background)
        ]

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate samples, tags included."""
        return {**collate(batch), "tags": torch.stack([self.of(sample["name"]) for sample in batch])}

    def of(self, name: str) -> Tensor:
        """Return the tags [K] of the picture ``name``."""
        if name not in self.tags:
            return torch.full((len(self.classes),), math.nan)
        return torch.tensor([float(label in self.tags[name]) for label in self.classes])


def labeled_loader(config: Config, data: Data, network: Network, start: int) -> DataLoader[Any]:
    """Return the labelled batches of the steps from ``start`` on: ``image``, ``mask``, ``valid``, ``name``."""
    return _train_loader(
        config, data, data.labeled, _weak_view(config, network), config.optim.batch_size, start, stream=0
    )


def unlabeled_loader(config: Config, data: Data, network: Network, start: int) -> DataLoader[Any]:
    """Return the unlabelled batches: ``weak``, ``strong``, ``valid``, ``tags``, ``name``."""
    views = WeakStrongViews(_weak_view(config, network), config.data.color_jitter, config.data.cutout)
    batch_size = config.optim.unlabeled_batch_size or config.optim.batch_size
    return _train_loader(config, data, data.unlabeled, views, batch_size, start, stream=1)


def _weak_view(config: Config, network: Network) -> WeakView:
    return WeakView(config.data.crop_size, network.stride, config.data.scales, network.mean.tolist())


def _train_loader(
    config: Config,
    data: Data,
    samples: list[Sample],
    views: WeakView | WeakStrongViews,
    batch_size: int,
    start: int,
    stream: int,
) -> DataLoader[Any]:
    dataset = SegmentationDataset(
        samples,
        len(data.classes),
        views,
        short_side=config.data.short_side,
        in_channels=config.model.in_channels,
        ignore_index=config.data.ignore_index,
        cache=config.data.cache,
        on_corrupt="skip",
    )
    sampler = StepSampler(len(dataset), batch_size, mix(config.run.seed, stream), config.optim.steps, start)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=WithTags(data) if stream else collate,
        num_workers=config.data.workers,
        pin_memory=choose_accelerator(config.run.accelerator) == "cuda",
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # the loader draws a seed of its own: not from the generator that a run saves
    )


class ResizeShortSide:
    """Resize an image so that its shorter side has ``size`` pixels, and leave its mask as it is."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def __call__(self, image: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Return ``image`` and, where there is one, ``mask``."""
        image = image if self.size is None else tvf.resize(image, [self.size], antialias=True)
        return {"image": image} if mask is None else {"image": image, "mask": mask}


def val_loader(config: DataConfig, data: Data, in_channels: int = 3) -> DataLoader[Any]:
    """Return the val pictures in lists of a few samples, ``image`` resized as in training, ``mask`` as it is."""
    dataset = SegmentationDataset(
        data.val,
        len(data.classes),
        ResizeShortSide(config.short_side),
        in_channels=in_channels,
        ignore_index=config.ignore_index,
    )
    return DataLoader(
        dataset,
        batch_size=EVAL_BATCH,
        num_workers=config.workers,
        collate_fn=list,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),
    )


def ignore_stop_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which schedulers send to all processes, to the main one: it ends its workers itself."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
