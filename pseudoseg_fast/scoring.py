"""Score what turns pictures into class ids over a whole set: a network, or an exported model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from pseudoseg_fast import functional
from pseudoseg_fast.data.labels import IGNORE_INDEX
from pseudoseg_fast.data.lists import shorten
from pseudoseg_fast.finite import NotFinite
from pseudoseg_fast.memory import OutOfMemory, is_out_of_memory
from pseudoseg_fast.network import Network

SampleCallback = Callable[[dict[str, Any], Tensor], None]
Labeler = Callable[[Tensor, tuple[int, int]], tuple[Tensor, Tensor]]
"""From images uint8 [B, C', H, W] and a size to class ids [B, *size], and bool [B]: which answers hold NaN."""


@dataclass(frozen=True)
class Scores:
    """Intersection over union of a whole set.

    Args:
        classes: names, in the order of ids.
        iou: [C] per class; NaN for a class that is neither in the truth nor predicted.
        pixels: [C] pixels of each class in the truth.
    """

    classes: tuple[str, ...]
    iou: tuple[float, ...]
    pixels: tuple[int, ...]

    @property
    def miou(self) -> float:
        """Mean over the classes that occur."""
        return float(torch.tensor(self.iou, dtype=torch.float64).nanmean())

    def table(self) -> str:
        """Return a table of IoU and share of pixels per class, the mean last."""
        width = max(len(name) for name in (*self.classes, "mIoU"))
        total = max(1, sum(self.pixels))
        lines = [f"{'class':<{width}}  {'IoU %':>6}  {'pixels %':>8}"]
        for name, iou, pixels in zip(self.classes, self.iou, self.pixels, strict=True):
            lines.append(f"{name:<{width}}  {100 * iou:>6.2f}  {100 * pixels / total:>8.2f}")
        return "\n".join([*lines, f"{'mIoU':<{width}}  {100 * self.miou:>6.2f}"])

    @staticmethod
    def unknown(classes: Sequence[str]) -> Scores:
        """Return scores of which nothing is known: NaN for every class."""
        return Scores(tuple(classes), (math.nan,) * len(classes), (0,) * len(classes))

    @staticmethod
    def from_confusion(confusion: Tensor, classes: Sequence[str]) -> Scores:
        """Make scores of a confusion matrix [C, C], rows truth, columns prediction."""
        confusion = confusion.double()
        truth = confusion.sum(1)
        union = truth + confusion.sum(0) - confusion.diag()
        iou = confusion.diag() / union  # 0 / 0 = NaN: a class that is nowhere
        return Scores(tuple(classes), tuple(iou.tolist()), tuple(int(count) for count in truth.tolist()))


@torch.inference_mode()
def evaluate(
    network: Network,
    batches: Iterable[list[dict[str, Any]]],
    classes: Sequence[str],
    *,
    align_corners: bool = False,
    watch: SampleCallback | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Score ``network`` in evaluation mode at the size of each mask: single scale, no flip.

    Args:
        network: on its device; its mode is restored afterwards.
        batches: lists of samples with ``name``, ``image`` uint8 [C', H, W] and ``mask`` uint8 [H', W'].
        classes: names, in the order of ids.
        align_corners: how logits are resized.
        watch: called with each sample and its predicted ids [H', W'].
        total: turns the confusion matrix of this process's batches into that of all.

    Raises:
        NotFinite: in all processes: the network answers pictures with NaN, of which no class is the largest.
    """
    device = next(network.parameters()).device

    def label(images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return predict(network, images.to(device), size, align_corners=align_corners)

    training = network.training
    network.eval()
    try:
        return score(label, batches, classes, device=device, watch=watch, total=total)
    finally:
        network.train(training)


def score(
    label: Labeler,
    batches: Iterable[list[dict[str, Any]]],
    classes: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    watch: SampleCallback | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Score whatever turns images into labels; arguments and errors are those of :func:`evaluate`."""
    confusion = MulticlassConfusionMatrix(
        len(classes), ignore_index=IGNORE_INDEX, validate_args=False, sync_on_compute=False
    ).to(device)
    parts = Parts(label)
    names: list[str] = []
    flags = [torch.zeros(0, dtype=torch.bool, device=device)]
    for batch in batches:
        for samples in group_by_size(batch):
            images = torch.stack([sample["image"] for sample in samples])
            labels, invalid = parts(images, tuple(samples[0]["mask"].shape))
            names += [sample["name"] for sample in samples]
            flags.append(invalid)
            masks = torch.stack([sample["mask"] for sample in samples]).to(device)
            confusion.update(labels.long(), masks.long())
            if watch:
                for sample, prediction in zip(samples, labels, strict=True):
                    watch(sample, prediction)
    wrong = torch.cat(flags)
    if count := int(total(wrong.sum()) if total else wrong.sum()):
        named = [name for name, flag in zip(names, wrong.tolist(), strict=True) if flag]
        raise NotFinite(
            f"the network outputs NaN for {count} of the val pictures, which therefore have no prediction: its weights "
            "or running statistics are damaged, or half precision is too little for them:\n"
            + shorten(named or ["those of another process"])
        )
    counts = confusion.compute()
    return Scores.from_confusion(total(counts) if total else counts, classes)


class Parts:
    """Labels pictures in parts as small as memory has room for: halves of what it had none for, and so on.

    Args:
        label: of a batch.
    """

    def __init__(self, label: Labeler) -> None:
        self.label = label
        self.most: int | None = None

    def __call__(self, images: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return what ``label`` returns of the whole batch.

        Raises:
            OutOfMemory: there is no room for a single picture; the message says what to do.
        """
        while True:
            most = min(len(images), self.most or len(images))
            try:
                labels, invalid = zip(*(self.label(part, size) for part in images.split(most)), strict=True)
                return torch.cat(labels), torch.cat(invalid)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).split("\n")[0]
            if most == 1:
                height, width = images.shape[-2:]
                raise OutOfMemory(
                    f"out of memory in evaluation, on a single picture of {width} x {height}: give a --data.short_side "
                    f"below {min(height, width)}, or take such pictures off data.val ({reason})"
                )
            self.most = most // 2


def predict(
    network: Network, images: Tensor, size: tuple[int, int], *, align_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """Return class ids [B, *size] for uint8 images [B, C', H, W] of any size, and bool [B]: whose logits hold NaN.

    The images are padded to the network's stride and the labels, made at the padded size, are cut back, so that every
    logit keeps its place; where ``size`` is not that of the images, to half a pixel.
    """
    height, width = images.shape[-2:]
    padded, _ = network.pad(images)
    full = [
        round(side * wanted / given)
        for side, wanted, given in zip(padded.shape[-2:], size, (height, width), strict=True)
    ]
    logits = network(padded).decoder_logits
    labels = functional.predict_labels(logits, (full[0], full[1]), align_corners=align_corners)
    return labels[:, : size[0], : size[1]], logits.isnan().flatten(1).any(1)


def labels_of_answer(answer: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a :data:`Labeler` does, of an exported model's answer: class ids [B, H, W] or values [B, C, H, W]."""
    if answer.ndim == 3:
        return answer, torch.zeros(len(answer), dtype=torch.bool)
    return answer.argmax(1), answer.isnan().flatten(1).any(1)


def group_by_size(samples: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split samples into groups whose images, and whose masks, have one size, so that each can be stacked."""
    groups: dict[tuple[torch.Size, torch.Size], list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        groups[sample["image"].shape, sample["mask"].shape].append(sample)
    return list(groups.values())
