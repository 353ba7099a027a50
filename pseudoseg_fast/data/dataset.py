"""The map-style data set of training and evaluation, its collation, and the count of unreadable pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from pseudoseg_fast.data.decode import UnreadableImage
from pseudoseg_fast.data.labels import Labels
from pseudoseg_fast.data.lists import DataError, Sample, shorten
from pseudoseg_fast.data.read import read_sample
from pseudoseg_fast.data.sampler import mix

logger = logging.getLogger(__name__)

Transform = Callable[[Tensor, Tensor | None], dict[str, Tensor]]
MAX_UNREADABLE = 0.01
MAX_REPLACEMENTS = 32


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Pictures with their masks, or without, ready for collation.

    An item is what ``transform`` returns (without one: ``image`` and, for labelled samples, ``mask``) with two more
    keys: ``name``, the sample's name, and ``corrupt``, the names of unreadable pictures that this item stands in for.

    An item is asked for as ``(index, seed)``, as :class:`~pseudoseg_fast.data.sampler.StepSampler` does: the transform
    then draws from torch's generator seeded with ``seed``, so that it does not matter which worker runs it, and the
    generator is left as it was. A plain ``index`` draws from the generator as it stands.

    Args:
        samples: as :func:`~pseudoseg_fast.data.lists.read_list` returns them.
        labels: what the values in mask files mean; in what the transform gets they are 0 to C - 1, and 255 for ignored.
        transform: called with image uint8 [in_channels, H, W] and mask uint8 [H, W] or None.
        short_side: resize so that the shorter side has this many pixels, before the transform.
        in_channels: 3 for colour, 1 for grey, or the number that the files have.
        white: value that becomes 255 in pictures of more than 8 bits, see
            :func:`~pseudoseg_fast.data.decode.read_image`.
        cache: keep decoded pictures in memory, each worker its own: for small sets.
        on_corrupt: ``"raise"`` stops at an unreadable picture; ``"skip"`` puts another sample in its place, chosen by
            the seed, for :class:`CorruptCounter` to count.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        labels: Labels,
        transform: Transform | None = None,
        *,
        short_side: int | None = None,
        in_channels: int = 3,
        white: float | None = None,
        cache: bool = False,
        on_corrupt: Literal["raise", "skip"] = "raise",
    ) -> None:
        if not samples:
            raise ValueError("a data set needs at least one sample, got none")
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        if short_side is not None and short_side < 1:
            raise ValueError(f"short_side must be at least 1 pixel, got {short_side}")
        if on_corrupt not in ("raise", "skip"):
            raise ValueError(f"on_corrupt must be 'raise' or 'skip', got {on_corrupt!r}")
        self.samples = samples
        self.labels = labels
        self.transform = transform
        self.short_side = short_side
        self.in_channels = in_channels
        self.white = white
        self.skip_corrupt = on_corrupt == "skip"
        self._cache: dict[int, tuple[Tensor, Tensor | None]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, seed = key if isinstance(key, tuple) else (key, None)
        corrupt: list[str] = []
        while True:
            try:
                image, mask = self._read(index)
                break
            except UnreadableImage as error:
                if not self.skip_corrupt:
                    raise
                corrupt.append(self.samples[index].name)
                if len(corrupt) > MAX_REPLACEMENTS:
                    raise DataError(
                        f"no readable picture in {len(corrupt)} draws; the last: {error}"
                    ) from error
                index = mix(index if seed is None else seed, len(corrupt)) % len(self.samples)
        item = self._transformed(image, mask, seed)
        return {**item, "name": self.samples[index].name, "corrupt": tuple(corrupt)}

    def load(self, sample: Sample, seed: int) -> dict[str, Any]:
        """Return the item of a sample that need not be one of the set's, without the key ``corrupt``.

        Raises:
            UnreadableImage: its picture cannot be decoded.
        """
        return {**self._transformed(*self._decode(sample), seed), "name": sample.name}

    def _read(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Return image and mask of a sample, from the cache where it has them; the caller may write to them."""
        if self._cache is not None and index in self._cache:
            image, mask = self._cache[index]
            return image.clone(), None if mask is None else mask.clone()
        image, mask = self._decode(self.samples[index])
        if self._cache is not None:
            self._cache[index] = (image.clone(), None if mask is None else mask.clone())
        return image, mask

    def _decode(self, sample: Sample) -> tuple[Tensor, Tensor | None]:
        return read_sample(
            sample, self.labels, short_side=self.short_side, channels=self.in_channels, white=self.white
        )

    def _transformed(self, image: Tensor, mask: Tensor | None, seed: int | None) -> dict[str, Tensor]:
        """Return the transform's views, drawn from a generator of their own when there is a seed."""
        if self.transform is None:
            return {"image": image} if mask is None else {"image": image, "mask": mask}
        if seed is None:
            return self.transform(image, mask)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.transform(image, mask)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack the tensors of items; ``name`` becomes a list of B names, ``corrupt`` one flat list of names."""
    tensors = default_collate(
        [{key: value for key, value in item.items() if key not in ("name", "corrupt")} for item in items]
    )
    return {
        **tensors,
        "name": [item["name"] for item in items],
        "corrupt": [name for item in items for name in item["corrupt"]],
    }


class CorruptCounter:
    """Count unreadable pictures in the main process: one warning a file, an error when they are more than a few.

    Args:
        total: number of training pictures.
        limit: share of them that may be unreadable.
    """

    def __init__(self, total: int, limit: float = MAX_UNREADABLE) -> None:
        self.total = total
        self.limit = limit
        self.names: dict[str, None] = {}

    def update(self, names: Iterable[str]) -> None:
        """Add the names of a batch's ``corrupt``.

        Raises:
            DataError: more than ``limit`` of the pictures are unreadable; the text lists them all.
        """
        for name in names:
            if name not in self.names:
                self.names[name] = None
                logger.warning("%s cannot be read: another picture takes its place", name)
        if len(self.names) > self.limit * self.total:
            raise DataError(
                f"{len(self.names)} of {self.total} training pictures cannot be read, more than "
                f"{100 * self.limit:.3g} %; repair them, or remove them and take them off lists:\n"
                + shorten(list(self.names), shown=len(self.names))
            )
