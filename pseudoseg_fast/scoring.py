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


@dataclass(frozen=True, eq=False)
class Scores:
    """What a confusion matrix of a whole set says of each class, and of all.

    A class without a pixel in the truth has no IoU, and counts in no mean: what is predicted as it is missed where it
    belongs. So the mean is over the same classes at each step, and steps can be compared. Where every class occurs in
    the truth, as in the benchmarks, the mean is everyone's mIoU.

    Args:
        classes: names, in the order of ids.
        confusion: int64 [C, C] pixels; rows truth, columns prediction.
    """

    classes: tuple[str, ...]
    confusion: Tensor

    @property
    def pixels(self) -> tuple[int, ...]:
        """Pixels of each class in the truth, [C]."""
        return tuple(self.confusion.sum(1).tolist())

    @property
    def iou(self) -> tuple[float, ...]:
        """Intersection over union per class, [C]; NaN for a class that is not in the truth."""
        truth, predicted, hit = self._counts()
        return _shares(hit, (truth + predicted - hit).where(truth > 0, torch.zeros_like(truth)))

    @property
    def dice(self) -> tuple[float, ...]:
        """Dice coefficient per class, which is the F1 score of its pixels, [C]; NaN where IoU is."""
        return tuple(2 * iou / (1 + iou) for iou in self.iou)

    @property
    def precision(self) -> tuple[float, ...]:
        """Share of a class's predicted pixels that are right, [C]; NaN for a class that is never predicted."""
        _, predicted, hit = self._counts()
        return _shares(hit, predicted)

    @property
    def recall(self) -> tuple[float, ...]:
        """Share of a class's true pixels that are found, [C]; NaN for a class that is not in the truth."""
        truth, _, hit = self._counts()
        return _shares(hit, truth)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes in the truth."""
        return float(torch.tensor(self.iou, dtype=torch.float64).nanmean())

    @property
    def accuracy(self) -> float:
        """Share of pixels that are right; NaN without any."""
        return _shares(self.confusion.diag().sum()[None], self.confusion.sum()[None])[0]

    def table(self) -> str:
        """Return a table of each class's scores and share of the true pixels, the mean last; a dash for no score."""
        names = ("IoU", "Dice", "precision", "recall", "pixels")
        total = max(1, sum(self.pixels))
        shares = [count / total for count in self.pixels]
        width = max(len(name) for name in (*self.classes, "class", "mIoU"))
        heads = [f"{name} %" for name in names]
        lines = [f"{'class':<{width}}  {'  '.join(heads)}"]
        for name, *values in zip(
            self.classes, self.iou, self.dice, self.precision, self.recall, shares, strict=True
        ):
            cells = [f"{_percent(value):>{len(head)}}" for head, value in zip(heads, values, strict=True)]
            lines.append(f"{name:<{width}}  {'  '.join(cells)}")
        lines.append(f"{'mIoU':<{width}}  {_percent(self.miou):>{len(heads[0])}}")
        absent = [name for name, count in zip(self.classes, self.pixels, strict=True) if not count]
        if absent and len(absent) < len(self.classes):
            lines.append(f"not in the mean, since no mask has a pixel of it: {', '.join(absent)}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Return all scores as JSON can hold them: shares from 0 to 1, None for those that there are not."""
        columns = {name: getattr(self, name) for name in ("iou", "dice", "precision", "recall", "pixels")}
        return {
            "miou": known(self.miou),
            "accuracy": known(self.accuracy),
            "classes": [
                {"name": name, **{column: known(values[index]) for column, values in columns.items()}}
                for index, name in enumerate(self.classes)
            ],
            "confusion": self.confusion.tolist(),
        }

    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return true, predicted and rightly predicted pixels of each class, [C] each."""
        return self.confusion.sum(1), self.confusion.sum(0), self.confusion.diag()

    @staticmethod
    def unknown(classes: Sequence[str]) -> Scores:
        """Return scores of which nothing is known: NaN for every class."""
        return Scores(tuple(classes), torch.zeros(len(classes), len(classes), dtype=torch.int64))


def known(score: float) -> float | None:
    """Return a score as JSON, which has no NaN, can hold it: None for one that there is not."""
    return None if math.isnan(score) else score


def _shares(part: Tensor, whole: Tensor) -> tuple[float, ...]:
    """Return the quotients of counts [C]; 0 / 0 is NaN."""
    return tuple((part.double() / whole.double()).tolist())


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f}"


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
    return Scores(tuple(classes), (total(counts) if total else counts).cpu())


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
