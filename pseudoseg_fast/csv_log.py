"""The log of a run as CSV: a row a call, on file at once, and readable after a kill at any moment."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger
from lightning_fabric.utilities.rank_zero import rank_zero_only

from pseudoseg_fast.csv_rows import read_rows, to_lines
from pseudoseg_fast.whole_file import replace_text


class CsvLog(Logger):
    """Write metrics to a CSV file with the columns ``step`` and whatever was logged so far, empty where it was not.

    A row is appended in one piece; where it brings new columns, the file is replaced in one rename.

    Args:
        path: of the file; what it holds is deleted with the first row, unless the log goes on (:meth:`go_on`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        """Part of Fabric's interface."""
        return "csv"

    @property
    def version(self) -> str:
        """Part of Fabric's interface."""
        return "log"

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **options: Any) -> None:
        """Refuse: ``config.yaml`` holds the configuration."""
        raise NotImplementedError("expected metrics; a run's configuration is in its config.yaml")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a row.

        Raises:
            OSError: the file cannot be written; the rows so far are intact, but for one torn line at the end at most.
        """
        row = {"step": str(step), **{name: str(float(value)) for name, value in metrics.items()}}
        if row.keys() <= set(self.columns):
            with self.path.open("a", encoding="utf-8", newline="") as file:
                file.write(to_lines(self.columns, [row]))
        else:
            rows = read_rows(self.path) if self.columns else []
            self._replace([*rows, row])

    @rank_zero_only
    def go_on(self, step: int) -> None:
        """Keep of the file the rows up to ``step``, and go on after them.

        Raises:
            OSError: the file cannot be written; it is intact.
        """
        rows = [row for row in read_rows(self.path) if int(row["step"]) <= step]
        if rows:
            self._replace(rows)

    def _replace(self, rows: list[dict[str, str]]) -> None:
        columns = ["step", *sorted({name for row in rows for name in row} - {"step"})]
        replace_text(self.path, to_lines(columns, [dict(zip(columns, columns, strict=True)), *rows]))
        self.columns = columns
