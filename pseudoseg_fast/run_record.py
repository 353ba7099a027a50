"""What a run has written to its folder, of itself and of its progress; needs no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pseudoseg_fast.csv_rows import read_rows

LOG = Path("log") / "metrics.csv"
Row = dict[str, float]

CONFIG = {
    "model": {"arch": str, "encoder_name": str},
    "method": {"name": str},
    "optim": {"steps": int},
    "run": {"precision": str},
}
"""What a report needs of ``config.yaml``, for :func:`check`."""

ABOUT = {
    "root": str,
    "pictures": {"labelled": int, "unlabelled": int, "tagged": int, "val": int},
    "classes": [
        {
            "name": str,
            "color": (int, int, int),
            "labelled_pixels": int,
            "labelled_pictures": int,
            "val_pixels": int,
        }
    ],
    "device": str,
    "processes": int,
    "environment": {"machine": {}, "versions": {}},
}
"""What it needs of ``run.json``."""

KINDS = {dict: "a mapping", list: "a list", int: "an integer", str: "text"}


@dataclass(frozen=True)
class Run:
    """What a run has written to its folder.

    Args:
        folder: of the run.
        config: the resolved configuration, as in ``config.yaml``.
        about: what ``run.json`` says of pictures, classes and environment.
        rows: of the log, in their order, without empty columns.
        finished: it has reached its last step and has been summed up.
    """

    folder: Path
    config: dict[str, Any]
    about: dict[str, Any]
    rows: list[Row]
    finished: bool

    @property
    def log(self) -> Path:
        """The file of the log; there is none before the first row."""
        return self.folder / LOG

    @property
    def steps(self) -> int:
        """The step of the log's last row; 0 without one."""
        return int(max((row["step"] for row in self.rows), default=0))

    @property
    def evaluations(self) -> list[Row]:
        """The rows that have scores."""
        return [row for row in self.rows if "eval/mIoU" in row]

    def curve(self, name: str, scale: float = 1.0) -> list[tuple[float, float]]:
        """Return (step, value) of a column."""
        return [(row["step"], scale * row[name]) for row in self.rows if name in row]

    def last(self, name: str) -> float | None:
        """Return the newest value of a column."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)


def read_run(folder: Path) -> Run:
    """Read the folder of a run, which may be writing to it.

    Raises:
        ValueError: it is no folder of a run, or a file in it is damaged; the message says where.
        OSError: a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"expected the folder of a run, its --run.dir; there is no folder {folder}")
    if missing := [name for name in ("config.yaml", "run.json") if not (folder / name).is_file()]:
        raise ValueError(
            f"{folder} is not the folder of a run, it holds no {' and no '.join(missing)}; "
            "expected a training's --run.dir"
        )
    parts: list[dict[str, Any]] = []
    for name, read, expected in (("config.yaml", yaml.safe_load, CONFIG), ("run.json", json.loads, ABOUT)):
        try:
            part = read((folder / name).read_text(encoding="utf-8"))
            check(part, expected)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{folder / name} is damaged, or not from a training: {error}") from error
        parts.append(part)
    rows = [{name: float(value) for name, value in row.items()} for row in read_rows(folder / LOG)]
    config, about = parts
    return Run(folder, config, about, rows, (folder / "result.json").is_file())


def check(value: object, expected: Any, name: str = "") -> None:
    """Check that a value is of the expected kind; a mapping may hold more than is expected of it.

    Args:
        value: from YAML or JSON.
        expected: a type; or a mapping of keys to what they hold, a list of what all entries are, or a tuple of what
            each of them is, and so on within.
        name: of the value, for the message.

    Raises:
        ValueError: the message names what is missing, or of another kind.
    """
    kind = expected if isinstance(expected, type) else list if isinstance(expected, tuple) else type(expected)
    if not isinstance(value, kind):
        raise ValueError(f"{name or 'the whole'} must be {KINDS[kind]}, got {value!r:.60}")
    if isinstance(value, dict):
        for key, inner in expected.items():
            inner_name = f"{name}.{key}" if name else key
            if key not in value:
                raise ValueError(f"{inner_name} is missing")
            check(value[key], inner, inner_name)
    elif isinstance(value, list):
        if isinstance(expected, tuple) and len(value) != len(expected):
            raise ValueError(f"{name} must have {len(expected)} entries, got {value!r:.60}")
        each = expected if isinstance(expected, tuple) else expected * len(value)
        for index, (entry, inner) in enumerate(zip(value, each, strict=True)):
            check(entry, inner, f"{name}[{index}]")
