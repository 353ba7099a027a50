"""From the configuration and the pictures of a run to the batches of a step."""

from __future__ import annotations

import atexit
import math
import multiprocessing
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tvf

from pseudoseg_fast.augment import WeakStrongViews, WeakView
from pseudoseg_fast.config import Config, DataConfig, choose_accelerator
from pseudoseg_fast.data.dataset import SegmentationDataset, collate
from pseudoseg_fast.data.decode import UnreadableImage, read_image, short_side_size
from pseudoseg_fast.data.lists import Sample
from pseudoseg_fast.data.sampler import StepSampler, mix
from pseudoseg_fast.data.sets import Data
from pseudoseg_fast.data.stream import Stream, StreamDataset
from pseudoseg_fast.memory import keep_freed_memory
from pseudoseg_fast.network import Network
from pseudoseg_fast.sgc import foreground_classes
from pseudoseg_fast.stop import HANGUP, work_quietly

EVAL_BATCH = 8

if "forkserver" in multiprocessing.get_all_start_methods():
    # The server, which workers are forked from by default from Python 3.14 on, imports once what took each seconds.
    multiprocessing.set_forkserver_preload(["__main__", "pseudoseg_fast.trainer"])


class WithTags:
    """Adds ``tags`` [K] to a sample: 1 for each class that its picture is tagged with, all NaN for one without tags."""

    def __init__(self, data: Data) -> None:
        self.tags = data.tags
        self.classes = foreground_classes(len(data.classes), data.background)

    def __call__(self, batch: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate samples, tags included."""
        return {**collate(batch), "tags": torch.stack([self.of(sample["name"]) for sample in batch])}

    def of(self, name: str) -> Tensor:
        """Return the tags [K] of the picture ``name``."""
        shown = self.tags.get(name)
        if shown is None:
            return torch.full((len(self.classes),), math.nan)
        return torch.tensor([float(index in shown) for index in self.classes])


def tag_frequency(data: Data) -> Tensor:
    """Return the share of the tagged pictures that has each of the K foreground classes, [K] float32.

    A class that none of them has counts as if one had it: a labelled picture may show it.
    """
    shares, least = data.tags.shares(), 1 / len(data.tags)
    foreground = foreground_classes(len(data.classes), data.background)
    return torch.tensor([max(shares[index], least) for index in foreground])


def labeled_loader(
    config: Config, data: Data, network: Network, start: int, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """Return the labelled batches of the steps from ``start`` on: ``image``, ``mask``, ``valid``, ``name``.

    ``optim.accumulate`` batches make a step; each of ``world_size`` processes has batches of its own.
    """
    views = _weak_view(config, network)
    return _train_loader(config, data, data.labeled, views, start, rank, world_size)


def unlabeled_loader(
    config: Config, data: Data, network: Network, start: int, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """Return the unlabelled batches: ``weak``, ``strong``, ``valid``, ``tags``, ``name``."""
    views = weak_strong_views(config, network)
    return _train_loader(config, data, data.unlabeled, views, start, rank, world_size)


def weak_strong_views(config: Config, network: Network) -> WeakStrongViews:
    """Return what draws the views of an unlabelled picture."""
    return WeakStrongViews(
        _weak_view(config, network), config.data.color_jitter, config.data.cutout, config.method.strong_views
    )


def _weak_view(config: Config, network: Network) -> WeakView:
    return WeakView(config.data.crop_size, network.stride, config.data.scales, network.mean.tolist())


def _train_loader(
    config: Config,
    data: Data,
    samples: Sequence[Sample],
    views: WeakView | WeakStrongViews,
    start: int,
    rank: int,
    world_size: int,
) -> DataLoader[Any]:
    if not isinstance(samples, Stream):
        with suppress(UnreadableImage):  # they are skipped and counted; other channels are in all pictures
            read_image(samples[0].image, config.model.in_channels, config.data.white)
    dataset = SegmentationDataset(
        samples,
        data.labels,
        views,
        short_side=config.data.short_side,
        in_channels=config.model.in_channels,
        white=config.data.white,
        cache=config.data.cache,
        on_corrupt="skip",
    )
    passes = config.optim.accumulate
    unlabeled = isinstance(views, WeakStrongViews)
    batch_size = (unlabeled and config.optim.unlabeled_batch_size) or config.optim.batch_size
    seed = mix(config.run.seed, int(unlabeled))
    options: dict[str, Any] = {
        "collate_fn": WithTags(data) if unlabeled else collate,
        "num_workers": config.data.workers,
        "pin_memory": choose_accelerator(config.run.accelerator) == "cuda",
        "worker_init_fn": start_worker,
        "generator": torch.Generator(),  # the loader draws a seed: not from the generator that a run saves
    }
    if isinstance(samples, Stream):
        streamed = StreamDataset(dataset, mix(seed, start * passes), rank, world_size, tagged=data.tags)
        return DataLoader(streamed, batch_size, **options)
    sampler = StepSampler(
        len(dataset),
        batch_size,
        seed,
        config.optim.steps * passes,
        start * passes,
        rank,
        world_size,
    )
    return DataLoader(dataset, batch_sampler=sampler, **options)


class ResizeShortSide:
    """Resize an image so that its shorter side has ``size`` pixels, and leave its mask as it is."""

    def __init__(self, size: int | None) -> None:
        self.size = size

    def __call__(self, image: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Return ``image`` and, where there is one, ``mask``."""
        if self.size is not None:
            height, width = image.shape[-2:]
            image = tvf.resize(image, list(short_side_size(height, width, self.size)), antialias=True)
        image = image.contiguous()
        return {"image": image} if mask is None else {"image": image, "mask": mask}


def val_loader(
    config: DataConfig, data: Data, in_channels: int = 3, rank: int = 0, world_size: int = 1
) -> DataLoader[Any]:
    """Return the val pictures in lists of a few samples, ``image`` resized as in training, ``mask`` as it is.

    Each of ``world_size`` processes has its share of them, and none has a picture twice.
    """
    dataset = SegmentationDataset(
        data.val,
        data.labels,
        ResizeShortSide(config.short_side),
        in_channels=in_channels,
        white=config.white,
    )
    return DataLoader(
        dataset,
        batch_size=EVAL_BATCH,
        sampler=range(rank, len(dataset), world_size),
        num_workers=config.workers,
        collate_fn=list,
        worker_init_fn=start_worker,
        generator=torch.Generator(),
    )


def start_worker(worker: int) -> None:
    """Leave signals that come to all processes, from terminals and schedulers, to the main one: it ends its workers.

    Pictures come and go in a worker as activations do in training: it keeps their memory, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM, HANGUP):
        if number is not None:
            signal.signal(number, signal.SIG_IGN)
    work_quietly()
    keep_freed_memory()


@atexit.register
def end_workers() -> None:
    """End the workers that are left where an error, such as Ctrl-C, has kept their loader until the end of Python.

    multiprocessing, which ends all daemonic children here, would send them SIGTERM, which they leave to the main
    process, and wait for ever.
    """
    if workers := [child for child in multiprocessing.active_children() if child.daemon]:
        with suppress(AttributeError):  # Windows has none
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would call it an error that a worker ends
        for worker in workers:
            worker.kill()
