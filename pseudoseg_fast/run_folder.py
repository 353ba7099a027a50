"""The folder of a run: which one it is, whether it may be used, and what of it is a run's own."""

from __future__ import annotations

import datetime
import json
from contextlib import suppress
from pathlib import Path

import yaml
from lightning_fabric import Fabric

from pseudoseg_fast import env
from pseudoseg_fast.config import Config, to_dict
from pseudoseg_fast.data.sets import Data
from pseudoseg_fast.visualize import mask_palette


def run_folder(config: Config) -> tuple[Path, Path | None]:
    """Return the folder of the run and the checkpoint to go on with, if any.

    A run goes on in its own folder, or in one that holds no other run.

    Raises:
        ValueError: the folder holds a run and nothing says what shall become of it, or there is nothing to resume.
    """
    run = config.run
    if run.dir is None:
        if run.resume == "auto":
            raise ValueError("run.resume auto needs to know the run: give --run.dir DIR")
        run.dir = f"runs/{config.method.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(run.dir)
    last = folder / "checkpoints" / "last.ckpt"
    path = None
    if run.resume:
        path = last if run.resume == "auto" else Path(run.resume)
        if not path.is_file():
            raise ValueError(f"run.resume expects a checkpoint of a run, found no file {path}")
        if path.resolve().parent == last.parent.resolve():
            return folder, path
    if ((folder / "config.yaml").exists() or last.exists()) and not run.overwrite:
        raise ValueError(
            f"{folder} already holds a run; go on with it: --run.resume auto, replace it: --run.overwrite true, "
            "or choose another --run.dir"
        )
    return folder, path


def describe_run(folder: Path, config: Config, data: Data, fabric: Fabric) -> None:
    """Write what the run is: ``config.yaml``, to start it again, and ``run.json``, what it found, for the report."""
    folder.mkdir(parents=True, exist_ok=True)
    colors = mask_palette(data.val[0].mask, len(data.classes), data.background).tolist()
    columns = zip(data.classes, colors, data.pixels, data.shown, data.val_pixels, strict=True)
    names = ("name", "color", "labelled_pixels", "labelled_pictures", "val_pixels")
    about = {
        "root": str(data.root),
        "layout": data.layout,
        "pictures": {
            "labelled": len(data.labeled),
            "unlabelled": len(data.unlabeled),
            "tagged": len(data.tags),
            "val": len(data.val),
        },
        "classes": [dict(zip(names, row, strict=True)) for row in columns],
        "device": str(fabric.device),
        "processes": fabric.world_size,
        "environment": {"machine": env.machine(), "versions": env.versions()},
    }
    (folder / "run.json").write_text(json.dumps(about, indent=2) + "\n")
    saved = to_dict(config)
    saved["run"] |= {"resume": None, "overwrite": False}
    (folder / "config.yaml").write_text(yaml.safe_dump(saved, sort_keys=False))


def clear_folder(folder: Path) -> None:
    """Delete the files that a run writes to its folder, and nothing else."""
    for pattern in (
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "log/metrics.csv",
        "log/events.out.tfevents.*",
        "pictures/step_*.png",
        "map.png",
        "result.json",
        "report.html",
    ):
        for path in folder.glob(pattern):
            path.unlink()
    with suppress(OSError):  # it is not there, or holds what is not a run's own
        (folder / "pictures").rmdir()
