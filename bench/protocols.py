"""What would the published protocols take? Counts operations and memory of each preset's step, and takes one.

python -m bench.protocols [--start] [--output bench/results/protocols.json]

Nothing is computed for the counts: tensors are shapes, so a step of any size takes seconds on any machine. Operations
are those of the matrix products and convolutions of a forward pass, times three where a backward one follows, as for
labelled and strong views. Memory is what the forward passes keep for the backward one under bf16 autocast, and
weights, gradients, optimiser and teacher in float32; working memory of single operations is left out, so the batch that
fits is chosen for FILL of the card. Hours assume RATE operations a second. ``--start`` takes a real step of 2 + 2
pictures of the right size on the CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pseudoseg_fast.config import Config, parse_config
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader
from pseudoseg_fast.network import Network
from pseudoseg_fast.networks import build_network
from pseudoseg_fast.step import StepLosses
from pseudoseg_fast.trainer import Trainer

CARD = 80 * 10**9
"""Bytes of the card that a batch should fit."""
FILL = 0.7
"""Share of it that the counted memory may take."""
RATE = 101e12
"""Operations a second: of voc12's passes of 16 + 16 pictures on an H200, 13.5 TFLOP in 133 ms (bench/results/gpu).

That is a tenth of the card's dense bf16 peak; ViTs, with fewer and larger products, may come to more.
"""

PICTURES = {"voc12": (500, 375), "coco": (640, 480), "cityscapes": (2048, 1024), "ade20k": (683, 512)}
"""Width and height of the pictures of a set, where they vary a common one."""
CLASSES = {"voc12": 21, "coco": 81, "cityscapes": 19, "ade20k": 150}
PRESETS = ("voc12", "voc12-dinov2", "coco", "cityscapes", "ade20k")


def count(preset: str) -> dict[str, Any]:
    """Return what a step of a preset takes, and a whole run."""
    config = parse_config(
        ["--config", preset, "--data.root", "unused", "--model.encoder_weights", "null"], "protocols", ""
    )
    name = preset.split("-")[0]
    network = build_network(config.model, CLASSES[name], 0 if name in ("voc12", "coco") else None)
    small, large = (kept_bytes(network, config, pictures) for pictures in (2, 4))
    growth = (large - small) / 2
    weights = sum(parameter.numel() for parameter in network.parameters())
    states = 2 if config.optim.name == "adamw" else 1
    fixed = 4 * weights * (2 + states + bool(config.method.ema))
    batch = int((FILL * CARD - fixed) / growth)
    pictures = config.optim.batch_size * config.optim.accumulate
    labeled, unlabeled = (operations(network, config, sgc=sgc) for sgc in (True, False))
    step = (3 * labeled + 3 * config.method.strong_views * unlabeled + labeled) * pictures
    return {
        "preset": preset,
        "crop": config.data.crop_size,
        "parameters, millions": weights / 1e6,
        "TFLOP a step": step / 1e12,
        "GB a picture pair": growth / 1e9,
        "GB without pictures": fixed / 1e9,
        "pictures a step": pictures,
        "pictures a pass": config.optim.batch_size,
        "batch that fits": batch,
        "steps": config.optim.steps,
        "GPU-hours": config.optim.steps * step / RATE / 3600,
    }


def operations(network: Network, config: Config, *, sgc: bool = True) -> int:
    """Return the operations of the forward pass of one picture, with the attention head or, as of strong views, not.

    Of the backward pass they are not counted but taken as twice as many: for grouped convolutions torch counts those of
    ungrouped ones. Attention is counted as the products that it is, since for the CPU's fused one torch counts nothing.
    """
    side = -(-config.data.crop_size // network.stride) * network.stride
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        image = torch.empty(1, 3, side, side)
        labels = torch.ones(1, network.classifier.out_features)
        with FlopCounterMode(display=False) as counter:
            network.eval()(image, sgc=sgc, image_labels=labels)
    return int(counter.get_total_flops())


def kept_bytes(network: Network, config: Config, pictures: int) -> int:
    """Return what a pass of ``pictures`` labelled and as many unlabelled ones keeps for the backward one."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    side = -(-config.data.crop_size // network.stride) * network.stride
    views = config.method.strong_views
    with FakeTensorMode(allow_non_fake_inputs=True):
        step = StepLosses(network.train(), config.method, None)
        images = torch.empty(pictures, 3, side, side, dtype=torch.uint8)
        valid = torch.ones(pictures, side, side, dtype=torch.bool)
        labeled = {"image": images, "mask": images[:, 0], "valid": valid}
        strong = images[:, None].expand(-1, views, -1, -1, -1)
        unlabeled = {
            "weak": images,
            "strong": strong,
            "valid": valid[:, None].expand(-1, views, -1, -1),
        }
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            step(labeled, unlabeled, 1.0)
    for parameter in network.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(kept.values())


def start(preset: str, folder: Path) -> dict[str, float]:
    """Take a step on made-up pictures in the layout of the set; return its losses and seconds."""
    name = preset.split("-")[0]
    root, lists = WRITERS[name](folder / preset)
    options = f"--config {preset} --data.root {root} {lists} --data.workers 0 --model.encoder_weights null"
    options += " --optim.accumulate 1"
    config = parse_config(
        f"{options} --optim.batch_size 2 --run.accelerator cpu --run.precision 32-true".split(),
        "protocols",
        "",
    )
    trainer = Trainer(config, folder / f"{preset}-run")
    loaders = (labeled_loader, unlabeled_loader)
    labeled, unlabeled = (iter(load(config, trainer.data, trainer.network, 0)) for load in loaders)
    began = time.monotonic()
    losses = trainer.training_step(trainer.next_batches(labeled, unlabeled), 1.0)
    return {
        **{name: float(loss) for name, loss in losses.items()},
        "seconds": time.monotonic() - began,
    }


def noise(path: Path, size: tuple[int, int]) -> None:
    """Write a made-up picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(0, 256, (24, 32, 3), dtype=torch.uint8).numpy()
    Image.fromarray(pixels).resize(size).save(path)


def blocks(path: Path, size: tuple[int, int], classes: int) -> None:
    """Write a made-up mask of class ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = torch.randint(0, classes, (12, 16), dtype=torch.uint8).numpy()
    Image.fromarray(ids).resize(size, Image.Resampling.NEAREST).save(path)


def write_voc(root: Path, pictures: int = 8) -> tuple[Path, str]:
    """Write made-up pictures as VOC has them, half of them labelled; return the folder and the lists to give."""
    names = [f"2007_{index:06}" for index in range(pictures)]
    for name in names:
        noise(root / f"JPEGImages/{name}.jpg", PICTURES["voc12"])
        blocks(root / f"SegmentationClass/{name}.png", PICTURES["voc12"], CLASSES["voc12"])
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    for part, chosen in (("train", names[: pictures // 2]), ("trainval", names), ("val", names[-2:])):
        (lists / f"{part}.txt").write_text("\n".join(chosen))
    (root / "unlabeled.txt").write_text("\n".join(f"JPEGImages/{name}.jpg" for name in names))
    return root, "--data.unlabeled unlabeled.txt"


def write_coco(root: Path) -> tuple[Path, str]:
    """Write made-up pictures as COCO has them."""
    for part, count in (("train2017", 4), ("val2017", 2)):
        for index in range(count):
            noise(root / f"{part}/{index:012}.jpg", PICTURES["coco"])
            blocks(root / f"masks/{index:012}.png", PICTURES["coco"], CLASSES["coco"])
    (root / "labeled.txt").write_text("".join(f"train2017/{i:012}.jpg masks/{i:012}.png\n" for i in range(2)))
    return root, "--data.labeled labeled.txt"


def write_cityscapes(root: Path) -> tuple[Path, str]:
    """Write made-up pictures as Cityscapes has them."""
    for part, count in (("train", 4), ("val", 2)):
        for index in range(count):
            stem = f"{part}/city/city_{index:06}_000019"
            noise(root / f"leftImg8bit/{stem}_leftImg8bit.png", PICTURES["cityscapes"])
            mask = root / f"gtFine/{stem}_gtFine_labelTrainIds.png"
            blocks(mask, PICTURES["cityscapes"], CLASSES["cityscapes"])
    return root, "--data.unlabeled leftImg8bit/train"


def write_ade(root: Path) -> tuple[Path, str]:
    """Write made-up pictures as ADE20K has them."""
    for part, count in (("training", 4), ("validation", 2)):
        for index in range(count):
            noise(root / f"images/{part}/ADE_{index:08}.jpg", PICTURES["ade20k"])
            blocks(root / f"annotations/{part}/ADE_{index:08}.png", PICTURES["ade20k"], CLASSES["ade20k"])
    return root, "--data.unlabeled images/training"


WRITERS: dict[str, Callable[[Path], tuple[Path, str]]] = {
    "voc12": write_voc,
    "coco": write_coco,
    "cityscapes": write_cityscapes,
    "ade20k": write_ade,
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--start", action="store_true", help="take a real step on made-up pictures, too")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    rows = []
    for preset in options.presets:
        row = count(preset)
        if options.start:
            with tempfile.TemporaryDirectory() as folder:
                row["first step"] = start(preset, Path(folder))
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.output:
        options.output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
