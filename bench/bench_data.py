"""How many pictures does a worker decode and augment in a second, and where does its time go?

CAMVID=FOLDER CCP=FOLDER python -m bench.bench_data --output bench/results/data_cpu.json

One process does what one worker of the loader does, on one thread, with the loader's own data set and views; stages are
timed by wrapping the functions that do them. Times are of the processor, not of the clock, so that other work on the
machine counts for little. Sets that are not part of the project are found through the environment and left out
without; ``voc`` is drawn: JPEGs of 500 x 375 pixels with masks as PNG, at VOC's crops.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from pseudoseg_fast import augment
from pseudoseg_fast.augment import WeakStrongViews, WeakView
from pseudoseg_fast.data import dataset, read
from pseudoseg_fast.data.dataset import SegmentationDataset, collate
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import Sample, read_list
from pseudoseg_fast.data.sampler import StepSampler
from pseudoseg_fast.memory import keep_freed_memory

BATCH = 8
SETS: dict[str, tuple[str, tuple[int, ...], str]] = {
    "voc": ("", (321, 513), ""),
    "camvid": ("CAMVID", (256, 352), "splits/1_8/labeled.txt"),
    "ccp": ("CCP", (256,), "splits/50/labeled.txt"),
}
"""The variable that names a set's folder, its crops, and a list of pictures with masks."""
STAGES: dict[str, list[tuple[Any, str]]] = {
    "decode picture": [(read, "read_image")],
    "decode mask": [(read, "read_mask")],
    "scale": [(augment.RandomScale, "transform")],
    "jitter": [(augment.ColorJitter, "transform")],
    "collate": [(dataset, "default_collate")],
}


class Clock:
    """Adds up what stages take."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that takes its time into account."""

        def run(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[stage] += time.process_time() - began

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time the stages inside."""
        with ExitStack() as stack:
            for stage, places in STAGES.items():
                for place, name in places:
                    stack.enter_context(patch.object(place, name, self.timed(stage, getattr(place, name))))
            yield


def draw_voc(folder: Path, count: int = 32) -> list[Sample]:
    """Write pictures of VOC's size and about its bytes, and masks of a few regions."""
    random = np.random.default_rng(0)
    samples = []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        pixels = np.array(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = (pixels + random.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8)
        ids = random.choice(np.array([0, 0, 5, 15, 255], np.uint8), (6, 8))
        image, mask = folder / f"{number}.jpg", folder / f"{number}.png"
        Image.fromarray(noisy).save(image, quality=90)
        Image.fromarray(ids).resize((500, 375), Image.Resampling.NEAREST).save(mask)
        samples.append(Sample(image.name, image, mask))
    return samples


def measure(samples: list[Sample], crop: int, kind: str, seconds: float) -> dict[str, Any]:
    """Return pictures per second of one worker, and the milliseconds that the stages of one picture take."""
    weak = WeakView(crop, 16)
    unlabeled = kind == "unlabelled"
    chosen = [sample._replace(mask=None) for sample in samples] if unlabeled else samples
    pool = SegmentationDataset(chosen, Labels(255), WeakStrongViews(weak) if unlabeled else weak)
    clock = Clock()
    pictures, best = 0, float("inf")
    with clock.watching():
        started = time.monotonic()
        for batch in StepSampler(len(pool), BATCH, 0, 10**6):
            began = time.process_time()
            collate([pool[key] for key in batch])
            best = min(best, time.process_time() - began)
            clock.seconds["all"] += time.process_time() - began
            pictures += BATCH
            if time.monotonic() - started > seconds:
                break
    per_picture = {stage: 1000 * taken / pictures for stage, taken in clock.seconds.items()}
    everything = per_picture.pop("all")
    per_picture["other"] = everything - sum(per_picture.values())
    return {
        "pictures": pictures,
        "pictures_per_second": 1000 / everything,
        "best_pictures_per_second": BATCH / best,
        "milliseconds": {stage: round(taken, 3) for stage, taken in per_picture.items()},
    }


def main() -> None:
    """Measure every set that is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="of the clock, for each row")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (variable, crops, listed) in SETS.items():
            if variable and variable not in os.environ:
                continue
            root = Path(os.environ[variable] if variable else folder)
            samples = read_list(listed, root) if variable else draw_voc(root)
            for crop in crops:
                for kind in ("labelled", "unlabelled"):
                    row = {"set": name, "crop": crop, "kind": kind} | measure(
                        samples, crop, kind, options.seconds
                    )
                    rows.append(row)
                    stages = ", ".join(
                        f"{stage} {taken:.2f}"
                        for stage, taken in row["milliseconds"].items()
                        if taken >= 0.005
                    )
                    print(f"{name} {crop} {kind}: {row['pictures_per_second']:.0f} pictures/s; ms: {stages}")
    if options.output:
        machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
        options.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
