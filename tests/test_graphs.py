"""Recorded passes, on the CPU: a recording runs the same function again, over the places that it was made with."""

import copy
import gc
import math
import random
import warnings
import weakref

import numpy as np
import pytest
import tiny
import torch

from pseudoseg_fast import stepper
from pseudoseg_fast.config import parse_config
from pseudoseg_fast.graphs import Graphs, record_graph, watched
from pseudoseg_fast.loaders import labeled_loader, unlabeled_loader
from pseudoseg_fast.memory import is_out_of_memory
from pseudoseg_fast.trainer import Trainer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.make_set(tmp_path_factory.mktemp("set") / "pictures")


VARIANTS = {
    "default": {},
    "teacher": {"method.ema": 0.9},
    "CutMix of two views": {"method.cutmix": 0.5, "method.strong_views": 2},
    "two passes": {"optim.accumulate": 2},
    "skipping": {"run.nonfinite": "skip"},
    "supervised": {"method.name": "supervised"},
}


def steps(root, folder, changes, weights, before=lambda trainer: None):
    """Take steps, ``before`` each of which something is done.

    Returns:
        Their losses, the last weights, and whether the last pass was recorded.
    """
    options = tiny.options(root, folder, {"optim.steps": len(weights)} | changes)
    trainer = Trainer(parse_config(options, "", ""), folder)
    for module in trainer.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # drawn on the CPU here
    config = trainer.config
    labeled = iter(labeled_loader(config, trainer.data, trainer.network, 0))
    unlabeled = (
        iter(unlabeled_loader(config, trainer.data, trainer.network, 0)) if trainer.data.unlabeled else None
    )
    torch.manual_seed(1)
    losses = []
    for trainer.step, weight in enumerate(weights):
        batches = trainer.next_batches(labeled, unlabeled if weight else None)
        before(trainer)
        losses.append(trainer.training_step(batches, weight))
    recorded = trainer.stepper.graphs is not None and trainer.stepper.graphs.replay is not None
    return losses, copy.deepcopy(trainer.network.state_dict()), recorded


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_recorded_steps_are_launched_ones(root, tmp_path, monkeypatch, changes):
    """Through the phase without unlabelled pictures, and while their weight grows."""
    weights = [0, 0, 0, 0, 0.25, 0.5, 0.75, 1.0]
    monkeypatch.setattr(stepper, "record_graph", lambda call: call)
    expected, after, recorded = steps(root, tmp_path / "launched", changes, weights)
    assert not recorded
    monkeypatch.setattr(stepper, "records", lambda *_: True)
    losses, same, recorded = steps(root, tmp_path / "recorded", changes, weights)
    assert recorded
    check_same(losses, expected)
    assert all(torch.equal(same[name], after[name]) for name in after)


def check_same(losses, expected):
    for ours, theirs in zip(losses, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_comes_between_recorded_steps(root, tmp_path, monkeypatch):
    """A step that is left out, an evaluation and a rehearsal."""

    def before(trainer):
        if trainer.step == 5:
            assert trainer.stepper.graphs is None or trainer.stepper.graphs.replay is not None
            trainer.evaluate()
            assert trainer.stepper.graphs is None or trainer.stepper.graphs.replay is None
        if trainer.step == 6:
            trainer.rehearse()

    changes = {"run.nonfinite": "skip"}
    weights = [0.5, 0.5, 0.5, math.nan, *[0.5] * 7]
    monkeypatch.setattr(stepper, "record_graph", lambda call: call)
    expected, after, _ = steps(root, tmp_path / "launched", changes, weights, before)
    assert expected[3] == {}
    monkeypatch.setattr(stepper, "records", lambda *_: True)
    losses, same, recorded = steps(root, tmp_path / "recorded", changes, weights, before)
    assert recorded
    check_same(losses, expected)
    assert all(torch.equal(same[name], after[name]) for name in after)


def test_where_nothing_can_be_recorded_a_warning_says_so(root, tmp_path, caplog):
    changes = {"run.cuda_graphs": True, "optim.steps": 1}
    trainer = Trainer(parse_config(tiny.options(root, tmp_path / "run", changes), "", ""), tmp_path / "run")
    assert trainer.stepper.graphs is None
    assert "run.cuda_graphs is for one process with a GPU" in caplog.text


class Recording:
    """Stands in for torch.cuda.graph, whose end fails as well where the recording failed."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        torch.cuda.set_stream("another")

    def __exit__(self, *_):
        raise RuntimeError("it ended badly")


@pytest.fixture
def streams(monkeypatch):
    """The streams that were made the current one."""
    seen = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the usual")
    monkeypatch.setattr(torch.cuda, "set_stream", seen.append)
    return seen


def test_a_failed_recording_says_what_failed_first(streams):
    def fail():
        raise RuntimeError("it waits")

    with pytest.raises(RuntimeError, match="recorded as CUDA graphs: it waits; give --run"):
        record_graph(fail)
    assert streams == ["another", "the usual"]


def test_memory_that_runs_out_in_a_recording_is_free_afterwards(streams):
    held = []

    def fill():
        tensor = torch.ones(3)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    gc.collect()
    gc.disable()
    try:
        try:
            record_graph(fill)
        except RuntimeError as error:
            reason, full = str(error), is_out_of_memory(error)
        assert full
        assert reason == "CUDA out of memory."
        assert held[0]() is None
    finally:
        gc.enable()


def make(take):
    weight = torch.nn.Parameter(torch.zeros(()))

    def run(labeled, unlabeled, factor, share):
        loss = take(labeled["image"]) * weight
        loss.backward()
        return {"L_s": loss.detach()}, {"L_s": loss.detach()}

    return Graphs(run, [weight], lambda call: call)


def batch(size):
    return {"image": torch.ones(size)}


def test_a_pass_is_recorded_once_its_kind_has_come_three_times_in_succession():
    passes = make(torch.sum)
    recorded = []
    for size in (2, 2, 3, 3, 3, 3, 2):
        passes(batch(size), None, 1.0, None)
        recorded.append(passes.replay is not None)
    assert recorded == [False, False, False, False, True, True, False]


def test_losses_of_a_pass_stay_when_the_next_comes():
    passes = make(torch.sum)
    (weight,) = passes.parameters
    weight.data.fill_(1.0)
    losses = [
        passes({"image": torch.full((2,), float(value))}, None, 1.0, None)[0]["L_s"] for value in range(6)
    ]
    assert [float(loss) for loss in losses] == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(()), random.random, np.random.rand], ids=["torch", "random", "numpy"]
)
def test_what_is_drawn_on_the_cpu_is_not_recorded(draw, caplog):
    passes = make(lambda images: images.sum() * float(draw()))
    with caplog.at_level("INFO"):
        for _ in range(5):
            passes(batch(2), None, 1.0, None)
    assert passes.replay is None
    assert caplog.text.count("draws random numbers on the CPU") == 1


def test_other_warnings_of_a_pass_are_passed_on():
    def look():
        with watched() as reasons:
            warnings.warn("something else", stacklevel=1)
        return reasons

    with pytest.warns(UserWarning, match="something else"):
        assert not look()
