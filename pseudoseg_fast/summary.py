"""What a finished run shows: the table of scores, pictures of what it learnt, and where everything is."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from pseudoseg_fast import visualize
from pseudoseg_fast.data.sets import DEMO
from pseudoseg_fast.evaluate import Scores, evaluate
from pseudoseg_fast.loaders import val_loader
from pseudoseg_fast.method import MethodConfig, pseudo_label
from pseudoseg_fast.network import Network
from pseudoseg_fast.visualize import Pixels
from pseudoseg_fast.whole_file import replace_text, replacing

if TYPE_CHECKING:
    from pseudoseg_fast.trainer import Trainer

EXAMPLES = 6
SUMMARY_FILES = ("samples.png", "map.png", "result.json")


def write_summary(trainer: Trainer, folder: Path) -> None:
    """Print the scores of a finished run and write ``samples.png``, ``result.json`` and, for the demo, ``map.png``."""
    scores, best = trainer.scores, trainer.best
    if scores is None or best is None:
        raise RuntimeError("a summary needs scores: call it after the last step has been evaluated")
    result = {
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "miou": {"best": known(best["miou"]), "best_step": best["step"], "last": known(scores.miou)},
        "iou": {name: known(iou) for name, iou in zip(scores.classes, scores.iou, strict=True)},
    }
    replace_text(folder / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(describe(scores, best, trainer.seconds))
    written = {**draw(trainer, folder), "checkpoints": trainer.checkpoints, "run": folder}
    for name, path in written.items():
        print(f"{name + ':':<13} {path}")


def draw(trainer: Trainer, folder: Path) -> dict[str, Path]:
    """Write the pictures of a run; return their names and paths."""
    config, data = trainer.config, trainer.data
    colors = visualize.mask_palette(data.val[0].mask, len(data.classes), data.background)
    if config.data.root != DEMO:
        # The map alone shows all val pictures; the predictions of a large set would fill the memory.
        data = dataclasses.replace(data, val=[data.val[index] for index in spread(len(data.val))])
    predictions: dict[str, Pixels] = {}

    def keep(sample: dict[str, Any], labels: Tensor) -> None:
        predictions[sample["name"]] = labels.to(torch.uint8).cpu().numpy()

    loader = val_loader(config.data, data, config.model.in_channels)
    evaluate(trainer.evaluated, loader, data.classes, align_corners=config.method.align_corners, watch=keep)
    written = {"pictures": folder / "samples.png"}
    samples = [loader.dataset[index] for index in spread(len(data.val))]
    pictures = draw_samples(
        trainer.evaluated.eval(),
        config.method,
        samples,
        2 * config.data.crop_size,
        predictions,
        data.classes,
        colors,
    )
    with replacing(written["pictures"]) as partial:
        pictures.save(partial, "png")
    if config.data.root == DEMO:
        written["map"] = folder / "map.png"
        others = [*data.labeled, *data.unlabeled]
        tiles = visualize.tile_map(data.val, predictions, others, data.classes, colors)
        with replacing(written["map"]) as partial:
            tiles.save(partial, "png")
    return written


def known(score: float) -> float | None:
    """Return a score as JSON, which has no NaN, can hold it: None for that of a class that is nowhere."""
    return None if math.isnan(score) else score


def describe(scores: Scores, best: dict[str, Any], seconds: float) -> str:
    """Return the final scores as text: the table of the last step, best and last mIoU, and the time."""
    return (
        f"\nlast step, on the val pictures:\n{scores.table()}\n\n"
        f"mIoU best {100 * best['miou']:.2f} % (step {best['step']}, chosen on these same pictures), "
        f"last {100 * scores.miou:.2f} %; {seconds:.0f} s of training\n"
    )


@torch.inference_mode()
def draw_samples(
    network: Network,
    method: MethodConfig,
    samples: Sequence[dict[str, Any]],
    long_side: int,
    predictions: dict[str, Pixels],
    classes: Sequence[str],
    colors: Pixels,
) -> Image.Image:
    """Draw input, truth, pseudo label and prediction of a few pictures.

    The pseudo label is what these pictures, had they been an unlabelled batch, would have taught: decoder and SGC fused
    and sharpened, its most likely class, paler where it is less sure. A supervised run has no SGC: the decoder alone.

    Args:
        network: in evaluation mode.
        method: how the pseudo label is made.
        samples: with ``image``, ``mask`` and ``name``.
        long_side: pictures are reduced to it for the pseudo label, whose attention is between all pairs of positions.
        predictions: class ids by name.
        classes: names.
        colors: uint8 [C, 3].
    """
    if method.name == "supervised":
        method = dataclasses.replace(method, gamma=1.0)
    images = [reduce(sample["image"], long_side) for sample in samples]
    stacked, valid = network.pad(*stack(images, network.mean))
    device = next(network.parameters()).device
    outputs = network(stacked.to(device), sgc=True, valid=valid.to(device))
    height, width = stacked.shape[-2:]
    confidences, ids = pseudo_label(method, outputs, (height, width)).float().cpu().max(1)
    rows = []
    for sample, image, confidence, labels in zip(samples, images, confidences, ids, strict=True):
        height, width = image.shape[-2:]
        guess = visualize.colorize(labels[:height, :width].to(torch.uint8).numpy(), colors)
        opacity = confidence[:height, :width, None].numpy()
        rows.append(
            [
                visualize.as_color(sample["image"].permute(1, 2, 0).numpy()),
                visualize.colorize(sample["mask"].numpy(), colors),
                np.round(255 - (255 - guess) * opacity).astype(np.uint8),
                visualize.colorize(predictions[sample["name"]], colors),
            ]
        )
    return visualize.grid(rows, ["input", "truth", "pseudo label", "prediction"], classes, colors)


def reduce(image: Tensor, long_side: int) -> Tensor:
    """Resize an image [C, H, W] so that its longer side has at most ``long_side`` pixels."""
    height, width = image.shape[-2:]
    scale = min(1.0, long_side / max(height, width))
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    return image if scale == 1 else tvf.resize(image, size, antialias=True)


def spread(total: int) -> list[int]:
    """Return at most ``EXAMPLES`` indices, evenly spread over ``total``, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, EXAMPLES).round().astype(int)).tolist()


def stack(images: Sequence[Tensor], mean: Tensor) -> tuple[Tensor, Tensor]:
    """Stack uint8 images [C, H, W] of any sizes, padded with the mean pixel; return their valid pixels, too."""
    height, width = (max(image.shape[side] for image in images) for side in (-2, -1))
    canvas = (255 * mean.cpu()).round().to(torch.uint8)[:, None, None].repeat(len(images), 1, height, width)
    valid = torch.zeros(len(images), height, width, dtype=torch.bool)
    for index, image in enumerate(images):
        canvas[index, :, : image.shape[1], : image.shape[2]] = image
        valid[index, : image.shape[1], : image.shape[2]] = True
    return canvas, valid
