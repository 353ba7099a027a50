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
from torch.utils.data import DataLoader

from pseudoseg_fast import visualize
from pseudoseg_fast.evaluate import Scores, evaluate
from pseudoseg_fast.loaders import DEMO, Data, val_loader
from pseudoseg_fast.method import MethodConfig, pseudo_label
from pseudoseg_fast.network import Network
from pseudoseg_fast.visualize import Pixels

if TYPE_CHECKING:
    from pseudoseg_fast.train import Trainer

EXAMPLES = 6
SUMMARY_FILES = ("samples.png", "map.png", "result.json")


def write_summary(trainer: Trainer, folder: Path) -> None:
    """Print the scores of a finished run and write ``samples.png``, ``result.json`` and, for the demo, ``map.png``."""
    config, data, scores, best = trainer.config, trainer.data, trainer.scores, trainer.best
    if scores is None or best is None:
        raise RuntimeError("a summary needs scores: call it after the last step has been evaluated")
    colors = visualize.mask_palette(data.val[0].mask, len(data.classes), data.background)
    if config.data.root != DEMO:
        # The map alone shows all val pictures; the predictions of a large set would fill the memory.
        data = dataclasses.replace(data, val=[data.val[index] for index in spread(len(data.val))])
    predictions: dict[str, Pixels] = {}

    def keep(sample: dict[str, Any], labels: Tensor) -> None:
        predictions[sample["name"]] = labels.to(torch.uint8).cpu().numpy()

    loader = val_loader(config.data, data, config.model.in_channels)
    evaluate(trainer.evaluated, loader, data.classes, align_corners=config.method.align_corners, watch=keep)
    samples = folder / "samples.png"
    draw_samples(trainer.evaluated, config.method, data, loader, predictions, colors).save(samples)
    written = {"pictures": samples}
    if config.data.root == DEMO:
        written["map"] = folder / "map.png"
        visualize.tile_map(
            data.val, predictions, [*data.labeled, *data.unlabeled], data.classes, colors
        ).save(written["map"])
    result = {
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "miou": {"best": known(best["miou"]), "best_step": best["step"], "last": known(scores.miou)},
        "iou": {name: known(iou) for name, iou in zip(scores.classes, scores.iou, strict=True)},
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(describe(scores, best, trainer.seconds))
    for name, path in {**written, "checkpoints": trainer.checkpoints, "run": folder}.items():
        print(f"{name + ':':<13} {path}")


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
    data: Data,
    loader: DataLoader[Any],
    predictions: dict[str, Pixels],
    colors: Pixels,
) -> Image.Image:
    """Draw input, truth, pseudo label and prediction of a few val pictures, evenly spread over the list.

    The pseudo label is what these pictures, had they been an unlabelled batch, would have taught: decoder and SGC fused
    and sharpened, its most likely class, paler where it is less sure. A supervised run has no SGC: the decoder alone.
    """
    if method.name == "supervised":
        method = dataclasses.replace(method, gamma=1.0)
    samples = [loader.dataset[index] for index in spread(len(data.val))]
    images, valid = network.pad(*stack([sample["image"] for sample in samples], network.mean))
    device = next(network.parameters()).device
    outputs = network.eval()(images.to(device), sgc=True, valid=valid.to(device))
    height, width = images.shape[-2:]
    label = pseudo_label(method, outputs, (height, width))
    rows = []
    for sample, (confidence, ids) in zip(samples, zip(*label.cpu().max(1), strict=True), strict=True):
        height, width = sample["image"].shape[-2:]
        guess = visualize.colorize(ids[:height, :width].to(torch.uint8).numpy(), colors)
        opacity = confidence[:height, :width, None].numpy()
        rows.append(
            [
                sample["image"].expand(3, -1, -1).permute(1, 2, 0).numpy(),
                visualize.colorize(sample["mask"].numpy(), colors),
                np.round(255 - (255 - guess) * opacity).astype(np.uint8),
                visualize.colorize(predictions[sample["name"]], colors),
            ]
        )
    return visualize.grid(rows, ["input", "truth", "pseudo label", "prediction"], data.classes, colors)


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
