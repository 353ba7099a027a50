"""Unlabelled pictures in tar files, as WebDataset packs them: few large files where millions of small ones are slow.

The heads of all members are read once, see :mod:`pseudoseg_fast.data.cache`. From then on a picture is a place in a
file, read by itself: the pool is shuffled as a whole, a pass shows each picture once, to one rank, and a run that is
resumed sees what it would have seen, as with pictures of their own. What must be read from its beginning, such as
pipes and URLs, cannot promise that: see :mod:`pseudoseg_fast.data.stream`.
"""

from __future__ import annotations

import glob
import logging
import os
import posixpath
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pseudoseg_fast.data.cache import SETTLED, Arrays, remember, stamps
from pseudoseg_fast.data.lists import IMAGE_SUFFIXES, DataError, Member, Sample, is_image, shorten
from pseudoseg_fast.data.samples import Names

logger = logging.getLogger(__name__)

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_REMOTE = re.compile(r"pipe:|[a-z0-9]+://")
_TAR = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz)$", re.IGNORECASE)
_BETWEEN_NAMES = re.compile(r"[\s/:?#&=;<>()'\"]+")
_EXACT = frozenset({"png", "tif", "tiff", "bmp"})
"""Suffixes of formats without loss, which masks need."""
_OF_MASKS = re.compile(
    r"(sem)?seg(m|mentation)?|semantic|panoptic|instances?|masks?|label(s|ids)?|annotations?|gt|trimap"
)


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
            "names": Names.of(name for one in heads for name in one.names).data,
            "places": np.concatenate(
                [
                    np.insert(one.places, 0, number, axis=1).astype(np.int64)
                    for number, one in enumerate(heads)
                ]
            ),
            "beside": np.array([one.beside for one in heads]),
            "examples": Names.of(one.example for one in heads).data,
            "began": np.array(began),
        }

    def fresh(arrays: Arrays) -> bool:
        return bool(now[:, 1].max() < arrays["began"] - SETTLED)

    known = remember("members", (shards, now.tolist()), fresh, find)
    samples = ShardSamples(Names.of(shards), Names(known["names"]), known["places"])
    if not samples:
        raise DataError(f"{text} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if beside := int(known["beside"].sum()):
        warn_of_beside(beside, text, next(filter(None, Names(known["examples"]))))
    return samples


def warn_of_beside(number: int, shards: str | Path, example: str) -> None:
    """Say that members of shards are left out that belong to the picture before them."""
    logger.warning(
        "%d members of %s are left out, such as %s: each lies behind a picture of its name, as a mask does",
        number,
        shards,
        example,
    )


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


def shard_name(url: str) -> str:
    """Return what the pictures of a shard behind a URL or a pipe are named after: its file, as on a disk."""
    last = re.split(r"[?#]", url)[0].rstrip("/").rpartition("/")[2]
    if _TAR.search(last) and not url.startswith("pipe:"):
        return last
    for command in url.split("|"):
        if words := [word for word in _BETWEEN_NAMES.split(command) if _TAR.search(word)]:
            return words[-1]
    return last


def member_name(name: str) -> str:
    """Return a member's name as its picture has it: ``tar -C folder -cf x.tar .`` puts ``./`` in front of all."""
    return posixpath.normpath(name).lstrip("/")


class PictureFilter:
    """Tells which members of a tar file are pictures; called with the name of each, in their order.

    Hidden members are none, such as macOS packs beside each file. Nor is what belongs to the picture before it, whose
    name it has up to a dot, where WebDataset packs masks, too: a word such as seg in ``7.seg.jpg``, or a format without
    loss that is another than the picture's, as of ``7.png`` behind ``7.jpg``. Frames with numbers are pictures.

    Attributes:
        beside: number of members that belonged to a picture.
        example: the first of them, or nothing.
    """

    def __init__(self) -> None:
        self.beside = 0
        self.example = ""
        self._picture = ""

    def __call__(self, name: str) -> bool:
        """Say whether a member is a picture."""
        if not is_image(name) or any(part.startswith(".") and part != ".." for part in name.split("/")):
            return False
        if _belongs(name, self._picture):
            self.beside += 1
            self.example = self.example or name
            return False
        self._picture = name
        return True


def _belongs(name: str, picture: str) -> bool:
    """Say whether a member is hardly a picture of its own, but a mask of the one before it, if any."""
    stem, suffix = os.path.splitext(picture)
    if not picture or not name.startswith(f"{stem}."):
        return False
    rest = name[len(stem) + 1 :].lower()
    *words, end = re.findall("[a-z]+|[0-9]+", rest)
    differs = end in _EXACT and f".{end}" != suffix.lower() and not any(map(str.isdecimal, words))
    return "/" not in rest and (differs or any(map(_OF_MASKS.fullmatch, words)))


class _Heads(NamedTuple):
    """What the heads of a shard's members say.

    Args:
        names: of the pictures.
        places: [N, 2] their offsets and sizes.
        beside: number of members that belong to a picture.
        example: one of them, or nothing.
    """

    names: list[str]
    places: NDArray[np.int64]
    beside: int
    example: str


def _read_heads(shard: str) -> _Heads | str:
    """Return what a shard holds, or what is wrong with it."""
    names: list[str] = []
    places: list[tuple[int, int]] = []
    above = os.path.basename(shard)
    is_picture = PictureFilter()
    try:
        size = os.path.getsize(shard)
        with tarfile.open(shard, "r:") as file:
            for member in file:
                if member.isreg() and is_picture(name := member_name(member.name)):
                    if member.offset_data + member.size > size:
                        return f"{shard} ends within {name}: it was cut off"
                    names.append(f"{above}/{name}")
                    places.append((member.offset_data, member.size))
                file.members = []  # type: ignore[attr-defined]  # of a million members none is needed again
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        return f"{shard} is not an uncompressed tar file: {error}"
    return _Heads(
        names, np.array(places, np.int64).reshape(len(places), 2), is_picture.beside, is_picture.example
    )
