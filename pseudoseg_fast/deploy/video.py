"""Read and write videos frame by frame (no torch; PyAV, the extra ``video``, is imported at the first use)."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
from PIL import Image

from pseudoseg_fast.data.decode import UnreadableImage
from pseudoseg_fast.deploy.model import Pixels


def import_av() -> ModuleType:
    """Return PyAV.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise RuntimeError(
            "videos need PyAV, which is not installed: pip install av, or give pictures only"
        ) from error
    return av


def read_frames(path: Path) -> Iterator[Image.Image]:
    """Yield a video's frames as RGB pictures, one at a time, upright as the file says that they are shown.

    Raises:
        UnreadableImage: the file cannot be decoded; frames before the damage have been yielded.
    """
    av = import_av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableImage(f"{path} has no video stream; expected a video")
            for frame in container.decode(video=0):
                # Degrees counterclockwise; telephones film portraits lying on their side.
                yield frame.to_image().rotate(frame.rotation, expand=True)
    except (av.error.FFmpegError, ValueError) as error:
        if isinstance(error, UnreadableImage):
            raise
        raise UnreadableImage(f"{path} cannot be read as a video: {error}") from error


def frame_rate(path: Path) -> Fraction:
    """Return a video's frames per second; 25 where the file does not say."""
    av = import_av()
    try:
        with av.open(str(path)) as container:
            rate = container.streams.video[0].average_rate if container.streams.video else None
    except (av.error.FFmpegError, ValueError) as error:
        raise UnreadableImage(f"{path} cannot be read as a video: {error}") from error
    return rate or Fraction(25)


class VideoWriter:
    """Writes pictures uint8 [H, W, 3] of one size as an H.264 video; an odd side loses its last line."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._container = import_av().open(str(path), "w", format="mp4")
        self._rate = rate
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None and kind is None:
            self._container.mux(self._stream.encode())
        self._container.close()

    def add(self, pixels: Pixels) -> None:
        """Append a picture.

        Raises:
            ValueError: a side is a single pixel.
            RuntimeError: PyAV cannot encode it.
        """
        height, width = (side // 2 * 2 for side in pixels.shape[:2])
        if not height or not width:
            raise ValueError(
                f"an overlay video needs sides of at least 2 pixels, got {pixels.shape[1]} x {pixels.shape[0]}; "
                "leave --overlay out"
            )
        av = import_av()
        try:
            if self._stream is None:
                self._stream = self._container.add_stream("h264", rate=self._rate)
                self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
            self._container.mux(self._stream.encode(frame))
        except av.error.FFmpegError as error:
            raise RuntimeError(f"the overlay video cannot be encoded: {error}") from error
