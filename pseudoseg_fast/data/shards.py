"""Unlabelled pictures in tar files, as WebDataset packs them: few large files where millions of small ones are slow.

The heads of all members are read once, see :mod:`pseudoseg_fast.data.cache`. From then on a picture is a place in a
file, read by itself: the pool is shuffled as a whole, a pass shows each picture once, to one rank, and a run that is
resumed sees what it would have seen, as with pictures of their own. What must be read from its beginning, such as
pipes and URLs, cannot promise that: see :mod:`pseudoseg_fast.data.stream`.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pseudoseg_fast.data.cache import SETTLED, Arrays, remember, stamps
from pseudoseg_fast.data.lists import IMAGE_SUFFIXES, DataError, Member, Sample, shorten
from pseudoseg_fast.data.samples import Names

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_REMOTE = re.compile(r"pipe:|[a-z0-9]+://")
_TAR = re.compile(r"\.(tar|tgz|tar\.\w+)$", re.IGNORECASE)


class ShardSamples(Sequence[Sample]):
    """Pictures in tar files.

    Args:
        shards: the files.
        names: of the pictures: the shard's name and the member's, with a slash between.
        places: [N, 3] the number of the shard, offset and size of each.
    """

    def __init__(self, shards: Names, names: Names, places: NDArray[np.int64]) -> None:
        self.shards = shards
        self.names = names
        self.places = places

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> ShardSamples: ...
    def __getitem__(self, index: int | slice) -> Sample | ShardSamples:
        if isinstance(index, slice):
            return ShardSamples(self.shards, self.names[index], self.places[index])
        name = self.names[index]
        shard, offset, size = self.places[index].tolist()
        path = Path(self.shards[shard])
        return Sample(name, Member(path, name.removeprefix(f"{path.name}/"), offset, size))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def are_shards(text: str | Path) -> bool:
    """Say whether an option means tar files, such as ``pool-{000..099}.tar`` or ``pool-*.tar``."""
    return bool(_REMOTE.match(str(text)) or _TAR.search(str(text)))


def are_remote(text: str | Path) -> bool:
    """Say whether an option means shards behind URLs or pipes."""
    return bool(_REMOTE.match(str(text)))


def read_shards(text: str | Path, root: Path) -> ShardSamples:
    """Return the pictures of tar files, in the order of shards and members.

    Args:
        text: names with ranges or wildcards, relative to the working directory or else to ``root``.
        root: the data set's root.

    Raises:
        DataError: a shard is missing, damaged, compressed or no file, or none holds a picture.
    """
    shards = _find(str(text), root)
    now = stamps(shards)

    def find() -> Arrays:
        began = time.time_ns()
        with ProcessPoolExecutor(min(len(shards), os.cpu_count() or 1)) as pool:
            found = list(
                tqdm(pool.map(_read_heads, shards), "index", len(shards), unit="shard", disable=None)
            )
        if wrong := [heads for heads in found if isinstance(heads, str)]:
            raise DataError(f"{len(wrong)} of {len(shards)} shards cannot be used:\n{shorten(wrong)}")
        heads = [one for one in found if not isinstance(one, str)]
        return {
            "names": Names.of(name for names, _ in heads for name in names).data,
            "places": np.concatenate(
                [
                    np.insert(places, 0, number, axis=1).astype(np.int64)
                    for number, (_, places) in enumerate(heads)
                ]
            ),
            "began": np.array(began),
        }

    def fresh(arrays: Arrays) -> bool:
        return bool(now[:, 1].max() < arrays["began"] - SETTLED)

    known = remember("shown-shards", (shards, now.tolist()), fresh, find)  # "shards" had hidden members, too
    samples = ShardSamples(Names.of(shards), Names(known["names"]), known["places"])
    if not samples:
        raise DataError(f"{text} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return samples


def _find(text: str, root: Path) -> list[str]:
    """Return the absolute paths of the shards that an option means."""
    found: list[str] = []
    missing = []
    for name in expand(text):
        for place in (os.path.abspath(name), os.path.abspath(root / name)):
            if paths := [place] if os.path.isfile(place) else sorted(glob.glob(place)):
                found += paths
                break
        else:
            missing.append(os.path.abspath(root / name))
    if missing:
        raise DataError(f"{len(missing)} shards of data.unlabeled {text} are missing:\n{shorten(missing)}")
    return found


def expand(word: str) -> list[str]:
    """Write out ranges: ``a-{00..11}.tar`` means twelve names."""
    match = _RANGE.search(word)
    if not match:
        return [word]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    names = [f"{word[: match.start()]}{number:0{len(first)}}{word[match.end() :]}" for number in numbers]
    return [each for name in names for each in expand(name)]


def is_picture(name: str) -> bool:
    """Say whether a member of a tar file is a picture; hidden ones are none, such as macOS packs beside each file."""
    hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
    return not hidden and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _read_heads(shard: str) -> tuple[list[str], NDArray[np.int64]] | str:
    """Return names and [N, 2] offsets and sizes of the pictures in a shard, or what is wrong with it."""
    names: list[str] = []
    places: list[tuple[int, int]] = []
    above = os.path.basename(shard)
    try:
        size = os.path.getsize(shard)
        with tarfile.open(shard, "r:") as file:
            for member in file:
                if member.isreg() and is_picture(member.name):
                    if member.offset_data + member.size > size:
                        return f"{shard} ends within {member.name}: it was cut off"
                    names.append(f"{above}/{member.name}")
                    places.append((member.offset_data, member.size))
                file.members = []  # type: ignore[attr-defined]  # of a million members none is needed again
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        return f"{shard} is no tar file that is not compressed: {error}"
    return names, np.array(places, np.int64).reshape(len(places), 2)
