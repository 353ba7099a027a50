"""How good are the pseudo labels of a checkpoint? Scores them against masks that training never saw.

python -m bench.label_quality RUN/checkpoints/last.ckpt --list splits/all.txt

Prints the mIoU of the decoder alone, of SGC alone and of their fusion, as the weak view would make them, without
augmentation, in batches drawn as in training (SGC normalises over its batch); and the same with true image-level
labels in the place of predicted ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassConfusionMatrix

from pseudoseg_fast.data.read import IGNORE_INDEX
from pseudoseg_fast.data.sets import read_data
from pseudoseg_fast.evaluate import Scores, group_by_size
from pseudoseg_fast.loaders import val_loader
from pseudoseg_fast.method import MethodConfig, pseudo_label
from pseudoseg_fast.network import Network
from pseudoseg_fast.networks import load_network
from pseudoseg_fast.sgc import image_labels_from_mask

GAMMAS = {"decoder": 1.0, "sgc": 0.0, "fused": 0.5}


@torch.inference_mode()
def label_quality(
    network: Network, method: MethodConfig, loader: DataLoader, classes: list[str]
) -> dict[str, Scores]:
    """Return the scores of each kind of label over all samples of ``loader``."""
    kinds = [f"{name}{suffix}" for suffix in ("", ", true tags") for name in GAMMAS]
    confusions = {kind: MulticlassConfusionMatrix(len(classes), ignore_index=IGNORE_INDEX) for kind in kinds}
    for batch in loader:
        for samples in group_by_size(batch):
            images, masks = (torch.stack([sample[key] for sample in samples]) for key in ("image", "mask"))
            padded, valid = network.pad(images)
            truth = image_labels_from_mask(masks, len(classes), network.background)
            tags: dict[str, Tensor | None] = {"": None, ", true tags": truth}
            for suffix, labels in tags.items():
                outputs = network(padded, sgc=True, image_labels=labels, valid=valid)
                for name, gamma in GAMMAS.items():
                    fused = pseudo_label(
                        dataclasses.replace(method, gamma=gamma), outputs, tuple(padded.shape[-2:])
                    )
                    ids = fused[..., : images.shape[-2], : images.shape[-1]].argmax(1).float()[:, None]
                    ids = torch.nn.functional.interpolate(ids, size=masks.shape[-2:], mode="nearest-exact")
                    confusions[name + suffix].update(ids[:, 0].long(), masks.long())
    return {
        kind: Scores.from_confusion(confusion.compute(), classes) for kind, confusion in confusions.items()
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    parser.add_argument("--list", default=None, help="pictures with masks; the run's val list unless given")
    options = parser.parse_args()
    network, config, state = load_network(options.checkpoint)
    if options.list:
        config.data.val = options.list
    data = read_data(config.data, labeled=False, unlabeled=False)
    random.Random(0).shuffle(data.val)
    scores = label_quality(network, config.method, val_loader(config.data, data), data.classes)
    print(
        json.dumps({"step": state["step"], **{kind: round(score.miou, 4) for kind, score in scores.items()}})
    )


if __name__ == "__main__":
    main()
