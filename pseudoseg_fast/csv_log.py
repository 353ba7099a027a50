"""The log of a run as CSV: a row a call, on file at once, and readable after a kill at any moment."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import Logger
from lightning_fabric.utilities.rank_zero import rank_zero_only

from pseudoseg_fast.csv_rows import read_rows, to_lines
from pseudoseg_fast.whole_file import replace_text

logger = logging.getLogger(__name__)


class CsvLog(Logger):
    """Write metrics to a CSV file with the columns ``step`` and whatever was logged so far, empty where it was not.

    A row is appended in one piece; where it brings new columns, the file is replaced in one rename. Rows that cannot be
    written wait in memory, with a warning, and go to the file with the next one that can.

    Args:
        path: of the file; what it holds is deleted with the first row, unless the log goes on (:meth:`go_on`).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.waiting: list[dict[str, str]] = []
        self.torn = False

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
        """Append a row."""
        self.waiting.append(
            {"step": str(step), **{name: str(float(value)) for name, value in metrics.items()}}
        )
        first = not self.torn
        if (error := self._write()) and first:
            logger.warning("%s cannot be written, its rows wait until it can: %s", self.path, error)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits, or say that it is lost."""
        if self.waiting and (error := self._write()):
            logger.warning("%s has no rows from step %s on: %s", self.path, self.waiting[0]["step"], error)

    @rank_zero_only
    def go_on(self, step: int, *, scored: bool = True) -> None:
        """Keep of the file the rows up to ``step``, without its scores unless it is ``scored``, and go on after them.

        Raises:
            OSError: the file cannot be written; it is intact.
        """
        last = (step, scored)
        rows = [row for row in read_rows(self.path) if (int(row["step"]), "eval/mIoU" in row) <= last]
        if rows:
            self._replace(rows)

    def _write(self) -> OSError | None:
        """Write the rows that wait; return why they cannot be."""
        try:
            if not self.torn and len(self.waiting) == 1 and self.waiting[0].keys() <= set(self.columns):
                with self.path.open("a", encoding="utf-8", newline="") as file:
                    file.write(to_lines(self.columns, self.waiting))
            else:
                rows = read_rows(self.path) if self.columns else []
                self._replace([*rows, *self.waiting[self._written(rows) :]])
        except OSError as error:
            self.torn = True  # there may be half a row at the end
            return error
        self.waiting, self.torn = [], False
        return None

    def _written(self, rows: list[dict[str, str]]) -> int:
        """Return how many of the rows that wait are at the end of the file, although writing them ended in an error."""
        counts = range(len(self.waiting), 0, -1) if self.torn else ()
        return next((count for count in counts if rows[-count:] == self.waiting[:count]), 0)

    def _replace(self, rows: list[dict[str, str]]) -> None:
        columns = ["step", *sorted({name for row in rows for name in row} - {"step"})]
        replace_text(self.path, to_lines(columns, [dict(zip(columns, columns, strict=True)), *rows]))
        self.columns = columns
