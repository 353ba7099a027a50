"""The log for TensorBoard: a convenience, whose failure costs a run nothing else."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from lightning_fabric.loggers import TensorBoardLogger
from lightning_fabric.utilities.rank_zero import rank_zero_only
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

logger = logging.getLogger(__name__)


class EventLog(TensorBoardLogger):
    """Fabric's log for TensorBoard, which warns once and falls silent where it cannot be written."""

    failed = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars."""
        self._attempt(lambda: super(EventLog, self).log_metrics(metrics, step))

    @rank_zero_only
    def log_image(self, name: str, image: Any, step: int) -> None:
        """Write a picture, uint8 [H, W, 3]."""
        self._attempt(lambda: self.experiment.add_image(name, image, step, dataformats="HWC"))

    @rank_zero_only
    def go_on(self, step: int) -> None:
        """Have readers forget what the files of earlier processes hold after ``step``.

        A killed run has logged steps that it has lost and takes again. The files are not rewritten: the new one begins
        with a mark.
        """
        start = Event(session_log=SessionLog(status=SessionLog.START))
        self._attempt(lambda: self.experiment.file_writer.add_event(start, step + 1))

    def save(self) -> None:
        """Bring to disk what was written."""
        self._attempt(super().save)

    def finalize(self, status: str) -> None:
        """Close the file."""
        self._attempt(lambda: super(EventLog, self).finalize(status))

    def _attempt(self, write: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            write()
        # Its writer is a thread, which hands on whatever error it ended with to later calls.
        except Exception as error:
            self.failed = True
            cause: BaseException = error
            while cause.__cause__ or cause.__context__:
                cause = cause.__cause__ or cause.__context__ or cause
            logger.warning("%s: TensorBoard gets no more of this run: %s", self.log_dir, cause)
