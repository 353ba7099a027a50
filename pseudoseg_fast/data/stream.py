"""Unlabelled pictures behind URLs and pipes: tar shards read from their beginning, with the webdataset library.

What can be promised of a stream is less than of files, see :mod:`pseudoseg_fast.data.shards`:

- Shards are dealt out to ranks and their workers as cards are: in a pass no two of them get the same one, and pictures
  are shuffled within a buffer of each worker. So a pass shows all pictures only where shards are many.
- What is seen depends on the seed, the step that a run starts or goes on from, and the numbers of ranks and workers. A
  run that is resumed sees other pictures than it would have seen.
- How many pictures there are must be told.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Iterator, Sequence
from typing import Any, overload

import torch
from torch.utils.data import IterableDataset, get_worker_info

from pseudoseg_fast.data.dataset import MAX_REPLACEMENTS, SegmentationDataset
from pseudoseg_fast.data.decode import UnreadableImage
from pseudoseg_fast.data.lists import Blob, DataError, Sample
from pseudoseg_fast.data.sampler import mix
from pseudoseg_fast.data.samples import Names
from pseudoseg_fast.data.shards import PictureFilter, member_name, shard_name, warn_of_beside

logger = logging.getLogger(__name__)


class Stream(Sequence[Sample]):
    """Shards that are only ever read from their beginning.

    Args:
        shards: URLs, as webdataset opens them.
        size: number of pictures in all of them.
    """

    names = Names.of(())  # nobody knows them

    def __init__(self, shards: Sequence[str], size: int) -> None:
        self.shards = list(shards)
        self.size = size

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        raise DataError(
            f"{self.shards[0]} is a stream, in which no picture has a place; expected files or shards on a disk"
        )


class StreamDataset(IterableDataset[dict[str, Any]]):
    """The endless stream of one rank, as items like those of :class:`~pseudoseg_fast.data.dataset.SegmentationDataset`.

    Args:
        pictures: reads and transforms them; its samples are a :class:`Stream`.
        seed: decides the order of shards, the shuffling and the views.
        rank: this process, 0 to ``world_size`` - 1.
        world_size: number of processes.
        shuffled: encoded pictures that a worker keeps, to draw the next among them.
        tagged: names of pictures that have tags. A warning says so where they name pictures of a shard that has none of
            these names, as long as a worker has met no tagged picture at all.

    Raises:
        DataError: webdataset is not installed; while iterating, a shard cannot be read, or nothing in it.
    """

    def __init__(
        self,
        pictures: SegmentationDataset,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffled: int = 1000,
        tagged: Collection[str] = (),
    ) -> None:
        if not isinstance(pictures.samples, Stream):
            raise TypeError(f"expected a Stream of pictures, got {type(pictures.samples).__name__}")
        try:
            import webdataset  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"{pictures.samples.shards[0]} is streamed by webdataset; run: pip install "
                "'pseudoseg-fast[webdataset]', or copy the shards to a disk"
            ) from error
        self.pictures = pictures
        self.shards = pictures.samples.shards
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.shuffled = shuffled
        self.tagged = tagged

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import webdataset

        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        hand = self.rank * workers + number
        seed = mix(self.seed, hand)
        shuffle = webdataset.shuffle(self.shuffled, rng=random.Random(seed))
        corrupt: list[str] = []
        for count, sample in enumerate(shuffle(self._samples(hand, self.world_size * workers))):
            try:
                item = self.pictures.load(sample, mix(seed, count))
            except UnreadableImage as error:
                corrupt.append(sample.name)
                if len(corrupt) > MAX_REPLACEMENTS:
                    raise DataError(
                        f"no readable picture in {len(corrupt)} of a stream; the last: {error}"
                    ) from error
                continue
            yield {**item, "corrupt": tuple(corrupt)}
            corrupt.clear()

    def _shards(self, hand: int, hands: int) -> Iterator[str]:
        """Yield the shards that are dealt to one hand, pass after pass, every pass in a new order."""
        dealt, order = -1, torch.empty(0, dtype=torch.int64)
        position = hand
        while True:
            if position // len(self.shards) != dealt:
                dealt = position // len(self.shards)
                generator = torch.Generator().manual_seed(mix(self.seed, ~dealt))
                order = torch.randperm(len(self.shards), generator=generator)
            yield self.shards[int(order[position % len(self.shards)])]
            position += hands

    def _samples(self, hand: int, hands: int) -> Iterator[Sample]:
        """Yield the pictures of the shards of one hand, encoded."""
        from webdataset.tariterators import tar_file_expander, url_opener

        bare = 0
        matched = not self.tagged
        told = hand > 0  # one worker is enough
        for shard in self._shards(hand, hands):
            first = ""
            name = shard_name(shard)
            is_picture = PictureFilter()
            try:
                # One by one: to group files, as webdataset does, writes what their names end with in small letters.
                files = tar_file_expander(
                    url_opener([{"url": shard}]),
                    select_files=is_picture,
                    rename_files=member_name,
                    eof_value=None,
                )
                for file in files:
                    member = f"{name}/{file['fname']}"
                    first = first or member
                    matched = matched or member in self.tagged
                    yield Sample(member, Blob(member, file["data"]))
            except Exception as error:  # programs and tar files fail in many ways
                raise DataError(f"{shard} cannot be streamed: {error}") from error
            bare = 0 if first else bare + 1
            if bare == len(self.shards):
                raise DataError(f"{shard} and {bare - 1} more shards hold no picture")
            if is_picture.beside and not told:
                told = True
                warn_of_beside(is_picture.beside, shard, is_picture.example)
            if not matched and (
                line := next((one for one in self.tagged if one.startswith(f"{name}/")), None)
            ):
                matched = True  # one warning is enough
                logger.warning(
                    "no picture of %s has a name that data.tags has: its names must be those of the stream, such as "
                    "%s, got %s",
                    shard,
                    first,
                    line,
                )
