"""What a finished run leaves: the table of scores, ``result.json``, the report, and where everything is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from pseudoseg_fast import visualize
from pseudoseg_fast.data.sets import DEMO
from pseudoseg_fast.loaders import val_loader
from pseudoseg_fast.report import write_report
from pseudoseg_fast.scoring import Scores, evaluate, known
from pseudoseg_fast.visualize import Pixels
from pseudoseg_fast.whole_file import replace_text, replacing

if TYPE_CHECKING:
    from pseudoseg_fast.trainer import Trainer


def write_summary(trainer: Trainer, folder: Path) -> None:
    """Print the scores of a finished run and write ``result.json``, ``report.html`` and, for the demo, ``map.png``."""
    scores, best = trainer.scores, trainer.best
    if scores is None or best is None:
        raise RuntimeError("a summary needs scores: call it after the last step has been evaluated")
    result = {
        "steps": trainer.step,
        "skipped_steps": trainer.stepper.skipped_steps,
        "seconds": round(trainer.seconds, 1),
        "miou": {"best": known(best["miou"]), "best_step": best["step"], "last": known(scores.miou)},
        "iou": {name: known(iou) for name, iou in zip(scores.classes, scores.iou, strict=True)},
    }
    replace_text(folder / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    print(describe(scores, best, trainer.seconds, trainer.stepper.skipped_steps))
    written = {}
    if trainer.config.data.root == DEMO:
        written["map"] = folder / "map.png"
        with replacing(written["map"]) as partial:
            demo_map(trainer).save(partial, "png")
    written |= {"report": write_report(folder), "checkpoints": trainer.checkpoints, "run": folder}
    for name, path in written.items():
        print(f"{name + ':':<13} {path}")


def demo_map(trainer: Trainer) -> Image.Image:
    """Draw the demo's map, of the predictions on all its val tiles."""
    config, data = trainer.config, trainer.data
    predictions: dict[str, Pixels] = {}

    def keep(sample: dict[str, Any], labels: Tensor) -> None:
        predictions[sample["name"]] = labels.to(torch.uint8).cpu().numpy()

    loader = val_loader(config.data, data, config.model.in_channels)
    evaluate(trainer.evaluated, loader, data.classes, align_corners=config.method.align_corners, watch=keep)
    colors = visualize.mask_palette(data.val[0].mask, data.labels, data.background)
    return visualize.tile_map(data.val, predictions, [*data.labeled, *data.unlabeled], data.classes, colors)


def describe(scores: Scores, best: dict[str, Any], seconds: float, skipped: int) -> str:
    """Return the final scores as text: the table of the last step, best and last mIoU, time, and skipped steps."""
    return (
        f"\nlast step, on the val pictures:\n{scores.table()}\n\n"
        f"mIoU best {100 * best['miou']:.2f} % (step {best['step']}, chosen on these same pictures), "
        f"last {100 * scores.miou:.2f} %; {seconds:.0f} s of training\n"
        + (f"steps left out, whose loss or gradient was not sound: {skipped}\n" if skipped else "")
    )
