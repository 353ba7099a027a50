"""How good are the pseudo labels? Scores them against masks that training never saw.

python -m bench.label_quality --checkpoint RUN/checkpoints/last.ckpt --list splits/all.txt
python -m bench.label_quality --list splits/all.txt --out labels.jsonl --config demo --run.dir runs/demo

The first scores a checkpoint; the second trains, with the options of ``pseudoseg_fast.train``, and scores at each
evaluation. Either way a line of JSON has, for the decoder alone, SGC alone and their fusion, as the weak view would
make them, without augmentation, in batches drawn as in training (SGC normalises over its batch): mIoU, the share of
right pixels, and for thresholds on the label's maximum the share of pixels above it and the share of those that is
right. All of it three times: with predicted image-level labels, with true ones (", tags"), and with those ruling out
every other class (", excluded"), which needs no calibration and therefore is made with norm none.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from pseudoseg_fast.config import parse_config
from pseudoseg_fast.data.labels import IGNORE_INDEX
from pseudoseg_fast.data.sets import Data, read_data
from pseudoseg_fast.loaders import val_loader
from pseudoseg_fast.method import MethodConfig
from pseudoseg_fast.network import Network, Outputs
from pseudoseg_fast.networks import load_network
from pseudoseg_fast.pseudo_labels import exclude_untagged, pseudo_label
from pseudoseg_fast.run_folder import held, run_folder
from pseudoseg_fast.scoring import Scores, group_by_size
from pseudoseg_fast.sgc import image_labels_from_mask
from pseudoseg_fast.train import prepare_folder, train_in
from pseudoseg_fast.trainer import Trainer

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)


class Quality:
    """Running scores of one kind of label.

    Args:
        classes: names.
    """

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self.confusion = MulticlassConfusionMatrix(len(classes), ignore_index=IGNORE_INDEX)
        self.pixels = 0
        self.kept = torch.zeros(len(THRESHOLDS))
        self.right = torch.zeros(len(THRESHOLDS))

    def update(self, label: Tensor, masks: Tensor) -> None:
        """Add soft labels [B, C, H, W] of pictures with masks [B, H, W]."""
        confidence, ids = label.max(1)
        self.confusion.update(ids, masks.long())
        known = masks != IGNORE_INDEX
        self.pixels += int(known.sum())
        for index, threshold in enumerate(THRESHOLDS):
            kept = known & (confidence >= threshold)
            self.kept[index] += kept.sum()
            self.right[index] += (kept & (ids == masks)).sum()

    def summary(self) -> dict[str, Any]:
        """Return the figures, rounded for JSON."""
        scores = Scores(tuple(self.classes), self.confusion.compute())
        above = {
            str(threshold): [round(float(kept) / self.pixels, 4), round(float(right / kept.clamp(min=1)), 4)]
            for threshold, kept, right in zip(THRESHOLDS, self.kept, self.right, strict=True)
        }
        return {
            "miou": round(scores.miou, 4),
            "right": round(scores.accuracy, 4),
            "above": above,
        }


@torch.inference_mode()
def label_quality(
    network: Network, method: MethodConfig, loader: DataLoader, classes: list[str]
) -> dict[str, dict[str, Any]]:
    """Return the figures of each kind of label over all samples of ``loader``."""
    gammas = {"decoder": 1.0, "sgc": 0.0, "fused": method.gamma if 0 < method.gamma < 1 else 0.5}
    qualities: dict[str, Quality] = {}

    def add(
        suffix: str, method: MethodConfig, outputs: Outputs, size: tuple[int, int], masks: Tensor
    ) -> None:
        for name, gamma in gammas.items():
            soft = pseudo_label(dataclasses.replace(method, gamma=gamma), outputs, size)
            quality = qualities.setdefault(name + suffix, Quality(classes))
            quality.update(soft[..., : masks.shape[-2], : masks.shape[-1]], masks)

    device = next(network.parameters()).device
    plain = dataclasses.replace(method, image_labels=False, exclude_untagged=False)
    shown = [
        image_labels_from_mask(sample["mask"][None].to(device), len(classes), network.background)
        for batch in loader
        for sample in batch
    ]
    frequency = torch.cat(shown).mean(0)
    for batch in loader:
        for samples in group_by_size(batch):
            images, masks = (
                torch.stack([sample[key] for sample in samples]).to(device) for key in ("image", "mask")
            )
            padded, valid = network.pad(images)
            # Labels are compared at the masks' size: the padding is scaled along and cut off.
            height, width = (
                round(side * wanted / given)
                for side, wanted, given in zip(
                    padded.shape[-2:], masks.shape[-2:], images.shape[-2:], strict=True
                )
            )
            truth = image_labels_from_mask(masks, len(classes), network.background)
            guessed = network(padded, sgc=True, valid=valid)
            told = network(padded, sgc=True, image_labels=truth, valid=valid)
            add("", plain, guessed, (height, width), masks)
            add(", tags", plain, told, (height, width), masks)
            told = exclude_untagged(told, truth, network.background, frequency)
            add(", excluded", dataclasses.replace(plain, norm="none"), told, (height, width), masks)
    return {kind: quality.summary() for kind, quality in qualities.items()}


def hidden_samples(config: Any, path: str | None) -> tuple[DataLoader, Data]:
    """Return a loader of the pictures of the list ``path``, the val list unless given, in a fixed random order."""
    config = dataclasses.replace(config, val=path or config.val)
    data = read_data(config, labeled=False, unlabeled=False)
    random.Random(0).shuffle(data.val)
    return val_loader(config, data), data


class Watched(Trainer):
    """A run whose labels are scored at each evaluation.

    Args:
        config, folder: as of :class:`Trainer`.
        path: list of pictures with masks.
        out: file that gets a line for each evaluation.
    """

    def __init__(self, config: Any, folder: Path, path: str | None, out: Path) -> None:
        super().__init__(config, folder)
        self.loader, self.hidden = hidden_samples(config.data, path)
        self.out = out

    def evaluate(self) -> None:
        """Evaluate as ever, then score the labels."""
        super().evaluate()
        labeler = self.evaluated
        training = labeler.training
        scores = label_quality(labeler.eval(), self.config.method, self.loader, self.hidden.classes)
        labeler.train(training)
        miou = None if self.scores is None else round(self.scores.miou, 4)
        with self.out.open("a") as file:
            file.write(json.dumps({"step": self.step, "val": miou, **scores}) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", help="score this one; without it, train")
    parser.add_argument("--list", help="pictures with masks; the val list unless given")
    parser.add_argument("--out", type=Path, help="file of JSON lines; the output unless given")
    options, rest = parser.parse_known_args(arguments)
    out = options.out or Path("/dev/stdout")
    if options.checkpoint:
        if rest:
            parser.error(f"with --checkpoint expected --list and --out alone, got {' '.join(rest)}")
        network, config, state = load_network(options.checkpoint)
        loader, data = hidden_samples(config.data, options.list)
        scores = label_quality(network, config.method, loader, data.classes)
        with out.open("a") as file:
            file.write(json.dumps({"step": state["step"], **scores}) + "\n")
        return 0
    config = parse_config(rest, parser.prog, "")
    folder, checkpoints = run_folder(config)
    if checkpoints:
        parser.error("expected a run from its first step: labels of steps gone by cannot be scored")
    trainer = Watched(config, folder, options.list, out)
    with held(folder):
        prepare_folder(trainer, folder, go_on=False)
        return train_in(folder, trainer)


if __name__ == "__main__":
    sys.exit(main())
