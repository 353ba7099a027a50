"""Segment pictures and videos with an exported model, without torch.

python -m pseudoseg_fast.predict model.onnx INPUT... --out DIR
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pseudoseg_fast.data.decode import IMAGE_MODES
from pseudoseg_fast.data.lists import DataError
from pseudoseg_fast.deploy import video
from pseudoseg_fast.deploy.files import Job, find_jobs, prepare_folder, write_whole
from pseudoseg_fast.deploy.model import DEVICES, Model, Pixels
from pseudoseg_fast.deploy.pictures import Picture, open_picture, to_color
from pseudoseg_fast.deploy.segment import Result, Segmenter, Settings, Size
from pseudoseg_fast.stop import end_quietly
from pseudoseg_fast.visualize import blend, colorize

MAX_PIXELS = 1_000_000_000
"""Largest picture that is decoded: 4 GB in memory. Satellite tiles of 30000 x 20000 are within it."""
_STRIP = 256  # rows that are coloured at a time
_FAILURES = (DataError, OSError, ValueError, RuntimeError, MemoryError)


class Writer:
    """Writes the results of pictures and videos below ``out``.

    Args:
        out: folder.
        colors: of the classes, uint8 [C, 3].
        opacity: of the classes in the overlay, or None for no overlay.
        probabilities: write them, too.
    """

    def __init__(self, out: Path, colors: Pixels, opacity: float | None, probabilities: bool) -> None:
        self.out = out
        self.colors = colors
        self.opacity = opacity
        self.probabilities = probabilities

    def suffixes(self) -> list[str]:
        """Return what is appended to a picture's name, for each of its results."""
        overlay = [".overlay.png"] if self.opacity is not None else []
        return [".png", *overlay, *([".npy"] if self.probabilities else [])]

    def picture(self, name: PurePosixPath, picture: Picture, result: Result) -> None:
        """Write the results of a picture; the overlay is drawn on ``picture`` itself where its mode allows."""
        self.values(f"{name}.npy", result)
        self.labels(f"{name}.png", result.labels)
        if self.opacity is not None:
            drawn = self.draw(picture, result.labels)
            write_whole(self.out, f"{name}.overlay.png", drawn.save)

    def labels(self, name: str, labels: Pixels) -> None:
        """Write class ids as a PNG with the classes' colours as its palette."""
        image = Image.fromarray(labels)
        image.putpalette(self.colors.tobytes())
        write_whole(self.out, name, image.save)

    def values(self, name: str, result: Result) -> None:
        """Write probabilities, unless there are none or they are in their file already."""
        values = result.probabilities
        if values is not None and not isinstance(values, np.memmap):
            write_whole(self.out, name, lambda path: np.save(path, values))

    def draw(self, picture: Picture, labels: Pixels) -> Image.Image:
        """Lay the classes' colours over a picture, strip by strip."""
        assert self.opacity is not None
        drawn = to_color(picture)
        for top in range(0, drawn.height, _STRIP):
            strip = drawn.crop((0, top, drawn.width, min(top + _STRIP, drawn.height)))
            color = colorize(labels[top : top + _STRIP], self.colors)
            drawn.paste(Image.fromarray(blend(np.asarray(strip), color, self.opacity)), (0, top))
        return drawn

    def large(self, name: PurePosixPath, picture: Picture, segmenter: Segmenter) -> Result:
        """Segment a large picture, its probabilities straight into their file."""
        if not self.probabilities:
            return segmenter.large(picture)
        shape = (len(self.colors), *segmenter.answer_size(picture))
        results: list[Result] = []

        def write(path: Path) -> None:
            array = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
            results.append(segmenter.large(picture, array))
            array.flush()

        write_whole(self.out, f"{name}.npy", write)
        return results[0]


class Predictor:
    """Segments jobs one after the other and keeps what went wrong.

    Pictures wait until there are enough of their size for a batch, or too many pixels wait in all.

    Attributes:
        count: pictures and frames done.
        failures: what went wrong, one text each.
    """

    def __init__(self, segmenter: Segmenter, writer: Writer, max_pixels: int) -> None:
        self.segmenter = segmenter
        self.writer = writer
        self.max_pixels = max_pixels
        self.count = 0
        self.failures: list[str] = []
        self._waiting: dict[tuple[Size, Size], list[tuple[Job, Picture]]] = {}

    def run(self, jobs: Sequence[Job]) -> None:
        """Segment all jobs; one that fails is noted and the rest go on."""
        start = time.monotonic()
        for done, job in enumerate(jobs, start=1):
            try:
                self._video(job) if job.is_video else self._picture(job)
            except _FAILURES as error:
                self._note(job, error)
            self._progress(done, len(jobs), start)
        for key in list(self._waiting):
            self._flush(key)
        self._progress(len(jobs), len(jobs), start, end="\n")
        seconds = time.monotonic() - start
        print(f"{self.count} pictures in {seconds:.1f} s, {self.count / max(seconds, 1e-9):.2f} images/s")

    def _picture(self, job: Job) -> None:
        metadata = self.segmenter.model.metadata
        picture = open_picture(job.source, metadata.channels, metadata.white, self.max_pixels)
        height, width = self.segmenter.working_size(picture)
        if height * width > self.max_pixels:
            raise DataError(
                f"{job.source}, {picture.width} x {picture.height}, would be resized to {width} x {height} pixels; "
                f"expected at most {self.max_pixels} in all, give --short-side 0 or raise --max-pixels"
            )
        if self.segmenter.is_large(picture):
            self.writer.picture(job.name, picture, self.writer.large(job.name, picture, self.segmenter))
            self.count += 1
            return
        key = self.segmenter.group_key(picture)
        self._waiting.setdefault(key, []).append((job, picture))
        settings = self.segmenter.settings
        if len(self._waiting[key]) >= self.segmenter.batch_size(picture):
            self._flush(key)
        limit = 4 * settings.batch_size * settings.tile**2
        while sum(waiting.width * waiting.height for _, waiting in self._all_waiting()) > limit:
            self._flush(next(iter(self._waiting)))

    def _all_waiting(self) -> Iterator[tuple[Job, Picture]]:
        for group in self._waiting.values():
            yield from group

    def _flush(self, key: tuple[Size, Size]) -> None:
        """Segment the waiting pictures of one size."""
        self._segment(self._waiting.pop(key))

    def _segment(self, group: list[tuple[Job, Picture]]) -> None:
        try:
            results = self.segmenter.small([picture for _, picture in group])
        except _FAILURES as error:
            if len(group) == 1:
                self._note(group[0][0], error)
            else:  # one of them may be to blame, or their number
                for one in group:
                    self._segment([one])
            return
        for (job, picture), result in zip(group, results, strict=True):
            try:
                self.writer.picture(job.name, picture, result)
                self.count += 1
            except _FAILURES as error:
                self._note(job, error)

    def _video(self, job: Job) -> None:
        """Segment a video's frames into a folder of numbered pictures; the overlay becomes a video in it."""
        channels = self.segmenter.model.metadata.channels
        if channels not in IMAGE_MODES:
            raise DataError(
                f"{job.source} is a video, whose frames have colours; the model expects {channels} channels, give TIFFs"
            )
        before = self.count
        if self.writer.opacity is None:
            self._frames(job, None)
        else:
            rate = video.frame_rate(job.source)

            def write(path: Path) -> None:
                with video.VideoWriter(path, rate) as writer:
                    self._frames(job, writer)

            write_whole(self.writer.out, job.name / "overlay.mp4", write)
        self._check_older(job, self.count - before)

    def _check_older(self, job: Job, count: int) -> None:
        """Raise DataError where a video's folder holds more than the ``count`` frames that were just written."""
        folder = self.writer.out / job.name
        numbered = (path for path in folder.glob("*.png") if path.stem.isdigit())
        if older := sorted(path for path in numbered if int(path.stem) >= count):
            raise DataError(
                f"{job.source} is done, {count} frames, but {folder} also holds {len(older)} of an earlier, longer "
                f"video, from {older[0].name} on; remove them"
            )

    def _frames(self, job: Job, overlay: video.VideoWriter | None) -> None:
        frames = enumerate(video.read_frames(job.source))
        for first in frames:
            batch = [first, *islice(frames, self.segmenter.batch_size(first[1]) - 1)]
            pictures = [picture for _, picture in batch]
            names = [job.name / f"{index:06d}" for index, _ in batch]
            if self.segmenter.is_large(pictures[0]):
                frame_by_frame = zip(names, pictures, strict=True)
                results = [
                    self.writer.large(name, picture, self.segmenter) for name, picture in frame_by_frame
                ]
            else:
                results = self.segmenter.small(pictures)
            for name, picture, result in zip(names, pictures, results, strict=True):
                self.writer.values(f"{name}.npy", result)
                self.writer.labels(f"{name}.png", result.labels)
                if overlay is not None:
                    overlay.add(np.asarray(self.writer.draw(picture, result.labels)))
                self.count += 1

    def _note(self, job: Job, error: BaseException) -> None:
        reason = str(error) or type(error).__name__
        self.failures.append(reason if str(job.source) in reason else f"{job.source}: {reason}")

    def _progress(self, done: int, total: int, start: float, end: str = "") -> None:
        if sys.stderr.isatty():
            rate = self.count / max(time.monotonic() - start, 1e-9)
            print(f"\r{done}/{total} inputs, {rate:.2f} images/s ", end=end, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m pseudoseg_fast.predict", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("model", help="file that python -m pseudoseg_fast.export made")
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="picture, video, folder (searched through) or glob"
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="folder of the results: NAME.png of class ids with a palette"
    )
    parser.add_argument(
        "--overlay", action="store_true", help="also NAME.overlay.png, colours over the picture"
    )
    parser.add_argument("--opacity", type=float, default=0.5, help="of the overlay's colours, 0 to 1")
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="also NAME.npy, float16 [classes, height, width]: 2 bytes x classes x pixels",
    )
    parser.add_argument("--flip", action="store_true", help="average with the answer to the mirrored picture")
    parser.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], help="average over the picture at these sizes"
    )
    parser.add_argument(
        "--tile", type=int, default=1024, help="cut pictures with a longer side into tiles of at most this"
    )
    parser.add_argument(
        "--overlap", type=int, help="pixels that neighbouring tiles share; default: an eighth of a tile"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="pictures of one size, or tiles, in a run")
    parser.add_argument(
        "--short-side",
        type=int,
        help="resize pictures so that the shorter side has this many pixels; 0: never; default: as in training",
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="auto: CUDA where there is one")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: ONNX Runtime's choice")
    parser.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        help="refuse pictures larger than this, or resized to more; default %(default)s",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line: status 0, 1 if some inputs failed, 2 if it cannot start."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    # Pillow refuses pictures beyond a limit of its own; here the limit is --max-pixels, checked before decoding.
    Image.MAX_IMAGE_PIXELS = None
    try:
        if not 0 <= options.opacity <= 1:
            raise ValueError(f"--opacity expects a number from 0 to 1, got {options.opacity}")
        model = Model(options.model, options.device, options.threads)
        metadata = model.metadata
        short_side = metadata.short_side if options.short_side is None else options.short_side or None
        settings = Settings(
            flip=options.flip,
            scales=tuple(options.scales),
            tile=options.tile,
            overlap=options.overlap,
            batch_size=options.batch_size,
            short_side=short_side,
            probabilities=options.probabilities,
        )
        segmenter = Segmenter(model, settings)
        writer = Writer(
            options.out,
            metadata.colors,
            options.opacity if options.overlay else None,
            options.probabilities,
        )
        jobs, masks, others = find_jobs(options.inputs, options.out, writer.suffixes())
        if any(job.is_video for job in jobs):
            video.import_av()
        prepare_folder(options.out)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n{parser.prog} --help lists all options\n")
    print(
        f"{options.model}: {len(metadata.classes)} classes, {metadata.precision}, answers {metadata.output}; "
        f"runs on {model.provider}"
        + (f"; pictures resized to a shorter side of {short_side}" if short_side else "")
    )
    for folder in masks:
        print(f"{folder} is left out: masks of the pictures beside it; give it by name to segment it, too")
    if others:
        named = ", ".join(
            f"{count} {suffix or 'without a suffix'}" for suffix, count in sorted(others.items())
        )
        print(f"{others.total()} files are left out, neither pictures nor videos by their suffixes: {named}")
    predictor = Predictor(segmenter, writer, options.max_pixels)
    predictor.run(jobs)
    if predictor.failures:
        print(f"{len(predictor.failures)} of {len(jobs)} inputs failed:", file=sys.stderr)
        for text in predictor.failures:
            print(f"  {text}", file=sys.stderr)
    return 1 if predictor.failures else 0


if __name__ == "__main__":
    end_quietly()
    sys.exit(main())
