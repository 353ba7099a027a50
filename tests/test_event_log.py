"""The log for TensorBoard, read as TensorBoard does."""

import pytest
from lightning_fabric.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pseudoseg_fast import event_log


def write(folder, steps, value, go_on_after=None):
    """Log as a process of its own; its file is older than those that come later, which readers see by its name."""
    log = TensorBoardLogger(folder, name="", version="log")
    if go_on_after is not None:
        event_log.go_on(log, go_on_after)
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
