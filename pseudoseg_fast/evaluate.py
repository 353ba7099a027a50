"""Score a checkpoint or an exported model on pictures with masks.

python -m pseudoseg_fast.evaluate --checkpoint FILE [--data...]
python -m pseudoseg_fast.evaluate --onnx FILE --checkpoint FILE | --data...
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from pseudoseg_fast import functional
from pseudoseg_fast.config import Config, DataConfig, Parser, choose_accelerator, to_dict
from pseudoseg_fast.data.lists import DataError, find_file, shorten
from pseudoseg_fast.data.read import IGNORE_INDEX
from pseudoseg_fast.data.sets import data_root
from pseudoseg_fast.depthwise import use_depthwise_kernels
from pseudoseg_fast.finite import NotFinite
from pseudoseg_fast.loaders import Data, read_data, val_loader
from pseudoseg_fast.memory import OutOfMemory, is_out_of_memory
from pseudoseg_fast.network import Network, Outputs
from pseudoseg_fast.networks import load_network
from pseudoseg_fast.stop import end_quietly

Watcher = Callable[[dict[str, Any], Tensor], None]
Labeler = Callable[[Tensor, tuple[int, int]], Tensor]
"""From images uint8 [B, channels, H, W] and a size to class ids [B, *size]."""


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
    watch: Watcher | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Score ``network`` in evaluation mode at the size of each mask: single scale, no flip.

    Args:
        network: on its device; its mode is restored afterwards.
        batches: lists of samples with ``image`` uint8 [3, H, W] and ``mask`` uint8 [H', W'].
        classes: names, in the order of ids.
        align_corners: how logits are resized.
        watch: called with each sample and its predicted ids [H', W'].
        total: turns the confusion matrix of this process's batches into that of all.

    Raises:
        NotFinite: in all processes: the network answers pictures with NaN, of which no class is the largest.
    """
    device = next(network.parameters()).device
    seen: list[str] = []
    flags: list[Tensor] = []
    latest: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, outputs: Outputs) -> None:
        latest[:] = [outputs.decoder_logits.isnan().flatten(1).any(1)]

    def label(images: Tensor, size: tuple[int, int]) -> Tensor:
        labels = predict(network, images.to(device), size, align_corners=align_corners)
        flags.extend(latest)
        return labels

    def note_name(sample: dict[str, Any], labels: Tensor) -> None:
        seen.append(sample["name"])
        if watch:
            watch(sample, labels)

    training = network.training
    network.eval()
    hook = network.register_forward_hook(note)
    try:
        scores = score(label, batches, classes, device=device, watch=note_name, total=total)
    finally:
        hook.remove()
        network.train(training)
    wrong = torch.cat(flags) if flags else torch.zeros(0, dtype=torch.bool, device=device)
    if count := int(total(wrong.sum()) if total else wrong.sum()):
        named = [name for name, flag in zip(seen, wrong.tolist(), strict=True) if flag]
        raise NotFinite(
            f"the network answers {count} of the pictures that it is scored on with NaN, so that they have no labels: "
            "its weights or running statistics are spoilt, or half precision is too little for them:\n"
            + shorten(named or ["those of another process"])
        )
    return scores


def score(
    label: Labeler,
    batches: Iterable[list[dict[str, Any]]],
    classes: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    watch: Watcher | None = None,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Scores:
    """Score whatever turns images into labels; the arguments are those of :func:`evaluate`."""
    confusion = MulticlassConfusionMatrix(
        len(classes), ignore_index=IGNORE_INDEX, validate_args=False, sync_on_compute=False
    ).to(device)
    parts = Parts(label)
    for batch in batches:
        for samples in group_by_size(batch):
            images = torch.stack([sample["image"] for sample in samples])
            labels = parts(images, tuple(samples[0]["mask"].shape))
            masks = torch.stack([sample["mask"] for sample in samples]).to(device)
            confusion.update(labels.long(), masks.long())
            if watch:
                for sample, prediction in zip(samples, labels, strict=True):
                    watch(sample, prediction)
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

    def __call__(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the labels of a batch.

        Raises:
            OutOfMemory: there is no room for a single picture; the message says what to do.
        """
        while True:
            most = min(len(images), self.most or len(images))
            try:
                return torch.cat([self.label(part, size) for part in images.split(most)])
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
) -> Tensor:
    """Return class ids [B, *size] for uint8 images [B, 3, H, W] of any size.

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
    return functional.predict_labels(logits, (full[0], full[1]), align_corners=align_corners)[
        :, : size[0], : size[1]
    ]


def group_by_size(samples: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Split samples into groups whose images, and whose masks, have one size, so that each can be stacked."""
    groups: dict[tuple[torch.Size, torch.Size], list[dict[str, Any]]] = defaultdict(list)
    for sample in samples:
        groups[sample["image"].shape, sample["mask"].shape].append(sample)
    return list(groups.values())


def parse_command(
    parser: Parser, arguments: list[str]
) -> tuple[Any, Network | None, Config | None, dict[str, Any]]:
    """Parse a command line with ``--checkpoint`` and ``--data...``: the run's own data are the defaults.

    Returns:
        The options, and the checkpoint's network, configuration and state; None, None and {} without a checkpoint.

    Raises:
        ValueError, OSError: see :func:`load_network`.
    """
    # The checkpoint is read before the rest of the command line can be.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--checkpoint")
    path = first.parse_known_args(arguments)[0].checkpoint
    if path is None:
        return parser.instantiate(parser.parse_args(arguments)), None, None, {}
    network, config, state = load_network(path)
    parser.set_defaults({f"data.{name}": value for name, value in to_dict(config)["data"].items()})
    options = parser.instantiate(parser.parse_args(arguments))
    given = {argument.partition("=")[0] for argument in arguments}
    if "--data.root" in given:
        check_lists(options.data, given)
    return options, network, config, state


def check_lists(config: DataConfig, given: set[str]) -> None:
    """Raise DataError for a list of the run that another root does not have.

    Args:
        config: the run's data, but for what was given.
        given: the options of the command line.
    """
    root = data_root(config)
    for name in ("val", "classes"):
        value = getattr(config, name)
        if value and f"--data.{name}" not in given:
            try:
                find_file(value, root)
            except DataError as error:
                raise DataError(
                    f"data.{name} is {value}, as in the run, and {error}; give --data.{name} null for what "
                    f"{config.root} holds, or a file of its own"
                ) from error


def check_classes(data: Data, classes: Sequence[str], owner: str) -> None:
    """Raise DataError unless the classes of the data are those of the network, in this order."""
    if data.classes != list(classes):
        raise DataError(
            f"data.classes names {len(data.classes)} classes: {', '.join(data.classes)}\n"
            f"{owner} has {len(classes)}: {', '.join(classes)}\n"
            "give --data.classes FILE with the latter in this order, and --data.label_map where ids in the masks differ"
        )


def score_onnx(path: str, device: str, config: DataConfig, data: Data) -> Scores:
    """Score an exported model on the val pictures, resized as in its training.

    Raises:
        ValueError, RuntimeError, OSError: see :class:`pseudoseg_fast.deploy.model.Model`.
    """
    try:
        from pseudoseg_fast.deploy.model import Model
    except ImportError as error:
        raise RuntimeError(f"--onnx needs ONNX Runtime: pip install onnxruntime ({error})") from error
    model = Model(path, device)
    check_classes(data, model.metadata.classes, "the model")
    trained = {name: getattr(model.metadata, name) for name in ("short_side", "white")}
    for name, value in trained.items():
        if (given := getattr(config, name)) not in (None, value):
            raise DataError(
                f"data.{name} is {given}, the model was trained with {'none' if value is None else value}; "
                "leave the option out"
            )
    config = replace(config, **trained)

    def label(images: Tensor, size: tuple[int, int]) -> Tensor:
        return torch.from_numpy(model.labels(images.numpy(), size))

    return score(label, val_loader(config, data, model.metadata.channels), data.classes)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; bad input ends with a message and status 2."""
    prog = "python -m pseudoseg_fast.evaluate"
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument("--checkpoint", type=str, help="a file such as RUN/checkpoints/best.ckpt")
    parser.add_argument("--onnx", type=str, help="score this exported model instead")
    parser.add_argument(
        "--accelerator", type=str, default="auto", help="cpu, cuda, or auto for the best there is"
    )
    parser.add_class_arguments(DataConfig, "data", help="the run's own unless given")
    given = {argument.partition("=")[0] for argument in arguments}
    try:
        if given.isdisjoint({"--checkpoint", "--onnx", "-h", "--help"}):
            parser.error("expected --checkpoint FILE, such as RUN/checkpoints/best.ckpt, or --onnx FILE")
        if "--onnx" in given and given.isdisjoint({"--checkpoint", "--data.root", "-h", "--help"}):
            parser.error(
                "expected pictures with masks to score the model on: --checkpoint FILE, for the val pictures of its "
                "run, or --data.root DIR"
            )
        options, network, config, state = parse_command(parser, arguments)
        data = read_data(options.data, labeled=False, unlabeled=False)
        if options.onnx is not None:
            title = f"{options.onnx},"
            scores = score_onnx(options.onnx, options.accelerator, options.data, data)
        else:
            assert network is not None
            assert config is not None
            title = f"{options.checkpoint}, step {state['step']},"
            check_classes(data, state["classes"], "the checkpoint")
            fabric = Fabric(
                accelerator=choose_accelerator(options.accelerator),
                devices=1,
                precision=config.run.precision,
            )
            network.to(fabric.device).to(memory_format=torch.channels_last)
            if fabric.device.type == "cpu":
                use_depthwise_kernels(network)
            with fabric.autocast():
                loader = val_loader(options.data, data, config.model.in_channels)
                scores = evaluate(network, loader, data.classes, align_corners=config.method.align_corners)
    except (ValueError, RuntimeError, OSError) as error:
        parser.error(str(error))
    print(f"{title} on {len(data.val)} pictures of {options.data.val or data.root}")
    print(scores.table())
    return 0


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
