"""The folder of a run: which one it is, whether it may be used, and what of it is a run's own."""

from __future__ import annotations

import datetime
from pathlib import Path

from pseudoseg_fast.config import Config
from pseudoseg_fast.summary import SUMMARY_FILES


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


def clear_folder(folder: Path) -> None:
    """Delete the files that a run writes to its folder, and nothing else."""
    for pattern in (
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "log/metrics.csv",
        "log/events.out.tfevents.*",
        *SUMMARY_FILES,
    ):
        for path in folder.glob(pattern):
            path.unlink()
