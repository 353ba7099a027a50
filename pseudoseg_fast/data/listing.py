"""What files lie below a folder: walked once, then known until a folder in it changes."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np

from pseudoseg_fast.data.cache import SETTLED, Arrays, remember
from pseudoseg_fast.data.lists import IMAGE_SUFFIXES, SHOWN, is_image
from pseudoseg_fast.data.samples import Names
from pseudoseg_fast.data.walk import walk

logger = logging.getLogger(__name__)

KEPT = 10_000
"""Folders of fewer files are walked each time."""
NOTES = re.compile(
    r"\.(txt|md|rst|pdf|html|jsonl?|geojson|xml|xmp|aae|csv|tsv|ya?ml|toml|ini|cfg|log|db|py|ipynb|sh|md5|sha256|"
    r"tfw|jgw|pgw|wld)",
    re.IGNORECASE,
)
"""Ends of what lies beside pictures, and nobody takes for one."""


def list_pictures(folder: Path) -> Names:
    """Return the pictures below a folder, relative to it, with forward slashes, sorted.

    A warning says how many files have suffixes that are not read, but for those of ``NOTES``.

    Large folders are walked once for all processes and runs, see :mod:`pseudoseg_fast.data.cache`; what is kept holds
    while none of the folders in it has changed, which adding, removing and renaming files does.
    """
    first = list(islice(walk(folder), KEPT))
    if len(first) < KEPT:
        names, unread = _sort_out(first, folder)
        _warn(folder, unread)
        return names

    def find() -> Arrays:
        began = time.time_ns()
        folders: dict[str, int] = {}
        names, unread = _sort_out(walk(folder, folders), folder)
        return {
            "names": names.data,
            "suffixes": Names.of(unread).data,
            "counts": np.array([*unread.values()], np.int64),
            "folders": Names.of(folders).data,
            "changed": np.array([*folders.values()], np.int64),
            "began": np.array(began),
        }

    known = remember("files", str(folder), _unchanged, find)
    _warn(folder, Counter(dict(zip(Names(known["suffixes"]), known["counts"].tolist(), strict=True))))
    return Names(known["names"])


def _sort_out(paths: Iterable[str], folder: Path) -> tuple[Names, Counter[str]]:
    """Return the pictures among the files below a folder, and how many of the others have which suffix."""
    start = len(str(folder).rstrip(os.sep)) + 1
    names: list[str] = []
    unread: Counter[str] = Counter()
    for path in paths:
        if is_image(path):
            names.append(path[start:].replace(os.sep, "/"))
        elif not NOTES.fullmatch(suffix := os.path.splitext(path)[1]):
            unread[suffix] += 1
    return Names.of(sorted(names)), unread


def _warn(folder: Path, unread: Counter[str]) -> None:
    """Say what is not read."""
    if unread:
        kinds = [f"{suffix or 'none'} ({count})" for suffix, count in unread.most_common(SHOWN)]
        logger.warning(
            "%d files below %s are left out, since their suffixes are not read: %s%s; expected %s",
            unread.total(),
            folder,
            ", ".join(kinds),
            ", ..." if len(unread) > SHOWN else "",
            ", ".join(sorted(IMAGE_SUFFIXES)),
        )


def _unchanged(arrays: Arrays) -> bool:
    """Say whether all folders are as they were, and had settled when they were read."""
    changed = arrays["changed"]
    try:
        now = [os.stat(path).st_mtime_ns for path in Names(arrays["folders"])]
    except OSError:
        return False
    return bool(changed.max() < arrays["began"] - SETTLED) and now == changed.tolist()
