"""What a finished run shows: the table of scores, pictures of what it learnt, and where everything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pseudoseg_fast import visualize
from pseudoseg_fast.evaluate import Scores, evaluate
from pseudoseg_fast.loaders import DEMO, Data, val_loader
from pseudoseg_fast.method import MethodConfig, pseudo_label
from pseudoseg_fast.network import Network
from pseudoseg_fast.visualize import Pixels

if TYPE_CHECKING:
    from pseudoseg_fast.train import Trainer

EXAMPLES = 6


def write_summary(trainer: Trainer, folder: Path) -> None:
    """Print the scores of a finished run and write ``samples.png``, ``result.json`` and, for the demo, ``map.png``."""
    config, data, scores, best = trainer.config, trainer.data, trainer.scores, trainer.best
    assert scores is not None and best is not None, "the last step is evaluated before the summary"
    colors = visualize.mask_palette(data.val[0].mask, len(data.classes), data.background)
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
        "miou": {"best": best["miou"], "best_step": best["step"], "last": scores.miou},
        "iou": dict(zip(scores.classes, scores.iou, strict=True)),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(describe(scores, best, trainer.seconds))
    for name, path in {**written, "checkpoints": trainer.checkpoints, "run": folder}.items():
        print(f"{name + ':':<13} {path}")


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
    loader: Any,
    predictions: dict[str, Pixels],
    colors: Pixels,
) -> Any:
    """Draw input, truth, pseudo label and prediction of a few val pictures, evenly spread over the list.

    The pseudo label is what the network would have learnt from, had the picture been an unlabelled one: SGC and decoder
    fused and sharpened, its most likely class, paler where it is less sure.
    """
    device = next(network.parameters()).device
    network.eval()
    rows = []
    for index in np.unique(np.linspace(0, len(data.val) - 1, EXAMPLES).round().astype(int)):
        sample = loader.dataset[int(index)]
        image = sample["image"]
        padded, valid = network.pad(image[None].to(device))
        outputs = network(padded, sgc=True, valid=valid)
        label = pseudo_label(method, outputs, tuple(padded.shape[-2:]))[
            0, :, : image.shape[1], : image.shape[2]
        ]
        confidence, classes = (part.cpu().numpy() for part in label.max(0))
        picture = image.permute(1, 2, 0).numpy()
        truth = visualize.colorize(sample["mask"].numpy(), colors)
        guess = visualize.colorize(classes.astype(np.uint8), colors)
        guess = np.round(255 - (255 - guess) * confidence[..., None]).astype(np.uint8)
        rows.append([picture, truth, guess, visualize.colorize(predictions[sample["name"]], colors)])
    return visualize.grid(rows, ["input", "truth", "pseudo label", "prediction"], data.classes, colors)
