"""The log for TensorBoard, read as TensorBoard does."""

import numpy as np
import pytest
from disk import full_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pseudoseg_fast.event_log import EventLog


def write(folder, steps, value, go_on_after=None):
    """Log as a process of its own; its file is older than those that come later, which readers see by its name."""
    log = EventLog(folder, name="", version="log")
    if go_on_after is not None:
        log.go_on(go_on_after)
    for step in steps:
        log.log_metrics({"loss": value}, step)
    log.finalize("success")
    (written,) = (folder / "log").glob("events.out.tfevents.1*")
    written.rename(written.with_name(f"events.out.tfevents.0{len(list(written.parent.iterdir()))}"))


def curve(folder):
    events = EventAccumulator(str(folder / "log")).Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


@pytest.mark.parametrize("step", [0, 2, 4])
def test_a_run_that_goes_on_has_each_step_once(tmp_path, step):
    write(tmp_path, [1, 2, 3, 4], 0.0)
    write(tmp_path, [step + 1, step + 2], 1.0, go_on_after=step)
    before = [(number, 0.0) for number in range(1, step + 1)]
    assert curve(tmp_path) == [*before, (step + 1, 1.0), (step + 2, 1.0)]
    write(tmp_path, [step + 2], 2.0, go_on_after=step + 1)
    assert curve(tmp_path) == [*before, (step + 1, 1.0), (step + 2, 2.0)]


def test_a_log_that_cannot_be_written_warns_once_and_falls_silent(tmp_path, caplog):
    log = EventLog(tmp_path, name="", version="log")
    log.log_metrics({"loss": 1.0}, 1)
    log.save()
    with full_disk(200):
        for step in range(2, 9):
            log.log_metrics({"loss": 2.35}, step)
            log.save()
    for step in range(9, 12):  # there is room again
        log.log_metrics({"loss": 2.35}, step)
        log.log_image("picture", np.zeros((2, 2, 3), np.uint8), step)
        log.save()
    log.finalize("success")
    (warning,) = caplog.messages
    assert warning.startswith(f"{tmp_path / 'log'}: TensorBoard gets no more of this run: ")
    assert "File too large" in warning
