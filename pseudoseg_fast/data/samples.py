"""Many samples in little memory: millions of them, the same pages for every worker.

A list of a million :class:`~pseudoseg_fast.data.lists.Sample` takes half a gigabyte, and each worker that touches it
gets pages of its own, since counting references writes to them. Here two arrays hold the bytes of the names,
and are only ever read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from pseudoseg_fast.data.lists import Sample


def spread(total: int, most: int) -> list[int]:
    """Return at most ``most`` indices, evenly spread over ``total``, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(most, total)).round().astype(int)).tolist()


class Names(Sequence[str]):
    """Texts in one array of bytes, each with a zero byte behind it.

    Args:
        data: uint8, the bytes.
    """

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data
        self.ends = np.flatnonzero(data == 0)

    @classmethod
    def of(cls, texts: Iterable[str]) -> Names:
        """Pack texts."""
        data = "".join([f"{text}\0" for text in texts]).encode("utf-8", "surrogateescape")
        return cls(np.frombuffer(data, np.uint8))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            return Names.of(self[place] for place in range(*index.indices(len(self))))
        place = range(len(self))[index]
        start = self.ends[place - 1] + 1 if place else 0
        return self.data[start : self.ends[place]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return iter(self.data.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1])


class Samples(Sequence[Sample]):
    """Pictures without masks, below one folder.

    Args:
        folder: what the names are relative to.
        names: of the pictures, with forward slashes.
    """

    def __init__(self, folder: Path = Path(), names: Names | None = None) -> None:
        self.folder = folder
        self.names = Names.of(()) if names is None else names

    def __len__(self) -> int:
        return len(self.names)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return Samples(self.folder, self.names[index])
        name = self.names[index]
        return Sample(name, self.folder / name)

    def __iter__(self) -> Iterator[Sample]:
        return (Sample(name, self.folder / name) for name in self.names)


class Joined(Iterable[Sample]):
    """The pictures of several sequences, one after the other, as often as they are gone through."""

    def __init__(self, *parts: Sequence[Sample]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[Sample]:
        return chain(*self.parts)
