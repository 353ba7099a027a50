"""The folder of a run: which one it is, whether it may be used, with what it goes on, and what of it is a run's own."""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from lightning_fabric import Fabric

from pseudoseg_fast import env
from pseudoseg_fast.config import Config, to_dict
from pseudoseg_fast.data.sets import Data
from pseudoseg_fast.kept import newest_first, remove_partial, steps_in
from pseudoseg_fast.visualize import mask_palette
from pseudoseg_fast.whole_file import make_folder, replace_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"

logger = logging.getLogger(__name__)


def is_restart() -> bool:
    """Return whether torchrun has started this process again; it counts on the node alone whose process failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def run_folder(config: Config, *, restart: bool = False) -> tuple[Path, list[Path]]:
    """Return the folder of the run and the checkpoints to go on with: the first whole one counts, none means a new run.

    A run goes on in its own folder, or in one that holds no other run. ``torchrun --max-restarts`` asks for a run that
    goes on in its folder, as ``run.resume`` auto does; what else ``run.resume`` names is for the first start.

    Args:
        config: of the run; gets the name of a folder where it has none.
        restart: :func:`is_restart` of any process.

    Raises:
        ValueError: the folder holds a run and nothing says what shall become of it, or there is nothing to resume.
    """
    run = config.run
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if run.dir is None:
        if run.resume == "auto" or restarts:
            asked = "torchrun --max-restarts" if restarts else "run.resume auto"
            raise ValueError(f"{asked} needs to know the run: give --run.dir DIR")
        run.dir = f"runs/{config.method.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if restarts and run.overwrite:
        raise ValueError(
            "run.overwrite and torchrun --max-restarts do not go together: a restart would delete the run"
        )
    folder = Path(run.dir)
    if not run.overwrite and (folder / "config.yaml").exists() and not holds_run(folder):
        raise ValueError(
            f"{folder} holds a config.yaml without the run.json that a run writes beside it, and the run's would take "
            "its place: move it elsewhere, choose another --run.dir, or let it go with --run.overwrite true"
        )
    if run.resume == "auto" or restart or (restarts and run.resume is None):
        paths = newest_first(folder / "checkpoints")
        if not paths and run.resume == "auto":
            logger.info("%s holds no checkpoint yet: a new run begins", folder)
        if paths or run.resume in (None, "auto"):
            return folder, paths
    paths = _checkpoints_of(Path(str(run.resume))) if run.resume else []
    if restart:  # what is in the folder is of the start before, which never came to a checkpoint
        return folder, paths
    if not (paths and is_own(folder, paths[0])) and holds_run(folder) and not run.overwrite:
        raise ValueError(
            f"{folder} already holds a run; go on with it: --run.resume auto, replace it: --run.overwrite true, "
            "or choose another --run.dir"
        )
    init = config.model.init
    if run.overwrite and not paths and init is not None and is_own(folder, Path(init)):
        raise ValueError(
            f"--run.overwrite true would delete {init}, which model.init names; choose another --run.dir"
        )
    return folder, paths


def _checkpoints_of(path: Path) -> list[Path]:
    """Return the checkpoint at ``path``, or those of the run in the folder ``path``."""
    paths = [path] if path.is_file() else newest_first(path / "checkpoints")
    if not paths:
        found = "none" if path.is_dir() else "no file"
        raise ValueError(f"run.resume expects a checkpoint of a run, or its folder, found {found} {path}")
    return paths


def is_own(folder: Path, checkpoint: Path) -> bool:
    """Return whether a checkpoint is of the run in ``folder``."""
    return checkpoint.resolve().parent == (folder / "checkpoints").resolve()


def holds_run(folder: Path) -> bool:
    """Return whether there is a run in ``folder``, be it one that never came to its first checkpoint."""
    described = all((folder / name).exists() for name in ("config.yaml", "run.json"))
    return described or bool(newest_first(folder / "checkpoints"))


def describe_run(folder: Path, config: Config, data: Data, fabric: Fabric) -> None:
    """Write what the run is: ``config.yaml``, to start it again, and ``run.json``, what it found, for the report."""
    colors = mask_palette(data.val[0].mask, data.labels, data.background).tolist()
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
    replace_text(folder / "run.json", json.dumps(about, indent=2) + "\n")
    saved = to_dict(config)
    saved["run"] |= {"resume": None, "overwrite": False}
    replace_text(folder / "config.yaml", yaml.safe_dump(saved, sort_keys=False))


def clear_folder(folder: Path) -> None:
    """Delete the files that a run writes to its folder, and nothing else."""
    for path in steps_in(folder / "checkpoints").values():
        path.unlink()
    for pattern in (
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "checkpoints/former-best.ckpt",
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


def forget_end(folder: Path, step: int) -> None:
    """Delete what a run wrote at an end that it now has before it once more, and pictures of after ``step``."""
    for name in ("map.png", "result.json", "report.html"):
        (folder / name).unlink(missing_ok=True)
    for path in (folder / "pictures").glob("step_*.png"):
        number = path.stem.removeprefix("step_")
        if number.isdecimal() and int(number) > step:
            path.unlink()


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder, and keep all other processes from training in it until the end.

    The lock is of a kind that dies with its process and that data workers, which may outlive it for seconds, do not
    inherit; the file that carries it stays.

    Raises:
        ValueError: another process trains there; the message says which.
        OSError: the folder cannot be written.
    """
    try:
        make_folder(folder)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        reason = f"{error.strerror}; expected a folder that the run can write to, choose another --run.dir"
        raise OSError(error.errno, reason, str(folder)) from error
    with file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise ValueError(
                    f"{folder} is in use by {file.read().strip() or 'another process'}; wait for its end, or choose "
                    "another --run.dir"
                ) from error
            logger.warning("%s: two runs in it would not notice each other (%s)", folder, error.strerror)
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since {datetime.datetime.now():%Y-%m-%d %H:%M}\n"
        )
        file.flush()
        remove_partial(folder / "checkpoints")
        yield
