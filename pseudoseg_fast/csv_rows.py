"""Rows of numbers as CSV text, and what can be read of it again wherever it was torn."""

from __future__ import annotations

import csv
import io
from pathlib import Path


def to_lines(columns: list[str], rows: list[dict[str, str]]) -> str:
    """Return rows as lines; a column that a row lacks is empty there."""
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the whole rows of a log, without empty columns; none where there is no file.

    A last line without an end was being written when its process died, and lines that are no rows of numbers are what a
    power failure leaves: both are passed over.
    """
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
    lines = csv.reader(io.StringIO(whole.replace("\0", "?"), newline=""))
    columns = next(lines, [])
    rows = []
    for values in lines:
        row = {name: value for name, value in zip(columns, values, strict=False) if value}
        if (
            len(values) == len(columns)
            and row.get("step", "").isdecimal()
            and all(map(_is_number, row.values()))
        ):
            rows.append(row)
    return rows


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
