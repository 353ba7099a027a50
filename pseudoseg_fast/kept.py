"""Which checkpoints of a run are kept, and in which order they are tried when the run goes on.

``step-N.ckpt`` are the last few, ``last.ckpt`` is another name of the newest, ``best.ckpt`` has the best score.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pseudoseg_fast import checkpoint
from pseudoseg_fast.whole_file import partial_name, replace_by_link

BEST = "best.ckpt"
LAST = "last.ckpt"
FORMER_BEST = "former-best.ckpt"
"""The best by scores that do not compare with those that the run has since had."""

logger = logging.getLogger(__name__)


def save_last(folder: Path, state: Mapping[str, Any], keep: int) -> None:
    """Write ``state`` as the newest checkpoint and delete all but the ``keep`` newest.

    At every moment ``last.ckpt`` is whole: the former one or this one. Checkpoints of later steps are deleted, too:
    a run that went back to an earlier one has taken another course.

    Raises:
        OSError: the folder cannot be written or the disk is full; the former checkpoints are intact.
    """
    step = state["step"]
    path = folder / f"step-{step}.ckpt"
    checkpoint.save(path, state)
    replace_by_link(folder / LAST, path)
    steps = steps_in(folder)
    kept = [number for number in steps if number <= step][-keep:]
    for number in set(steps) - set(kept):
        steps[number].unlink()


def go_back(folder: Path, path: Path, step: int) -> None:
    """Make ``path``, of ``step``, the newest checkpoint, and delete those of later steps.

    Until it comes to its next checkpoint, a run that went back would otherwise be taken up again where it had left.
    ``best.ckpt`` stays: it has the best score that the run has ever come to, and says of which step it is.

    Raises:
        OSError: the folder cannot be written.
    """
    last = folder / LAST
    if last.exists() and last.samefile(path):
        return
    replace_by_link(last, path)
    for number, later in steps_in(folder).items():
        if number > step:
            later.unlink()


def steps_in(folder: Path) -> dict[int, Path]:
    """Return the checkpoints that are named after their step, the oldest first."""
    named = [(path.stem.removeprefix("step-"), path) for path in folder.glob("step-*.ckpt")]
    return dict(sorted((int(number), path) for number, path in named if number.isdecimal()))


def newest_first(folder: Path) -> list[Path]:
    """Return the checkpoints that a run can go on from, in the order in which they are to be tried."""
    paths = [folder / LAST, *reversed(steps_in(folder).values()), folder / BEST]
    return [path for path in paths if path.is_file()]


def load_first_whole(paths: Sequence[Path]) -> tuple[Path, dict[str, Any]]:
    """Return the first of ``paths`` that can be read, and what it holds; say why those before it cannot.

    Raises:
        ValueError: none can.
    """
    reasons = []
    for path in paths:
        try:
            state = checkpoint.load(path)
        except (ValueError, FileNotFoundError) as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            logger.warning("%s", reason)
        if reasons:
            logger.warning("going on with %s, of step %d, instead", path, state["step"])
        return path, state
    beside = [path.name for path in newest_first(paths[0].parent) if path not in paths]
    raise ValueError("\n".join(reasons) + (f"\nbeside it are {', '.join(beside)}" if beside else ""))


def remove_partial(folder: Path) -> None:
    """Delete what a kill left of checkpoints that were being written."""
    for path in folder.glob(partial_name(folder / "*.ckpt").name):
        path.unlink()
