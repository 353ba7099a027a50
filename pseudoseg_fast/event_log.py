"""The log for TensorBoard of a run that goes on."""

from __future__ import annotations

from lightning_fabric.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog


def go_on(log: TensorBoardLogger, step: int) -> None:
    """Have readers forget what the files of earlier processes hold after ``step``.

    A killed run has logged steps that it has lost and takes again. The files are not rewritten: the new one begins
    with a mark.
    """
    start = Event(session_log=SessionLog(status=SessionLog.START))
    log.experiment.file_writer.add_event(start, step + 1)
