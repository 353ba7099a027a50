"""Whether two runs came out the same, to the bit."""

import json

import tiny
import torch

STEPS = 6
CHANGES = {
    "method.ema": 0.9,
    "method.cutmix": 0.5,  # draws from the generator that a checkpoint saves
    "optim.steps": STEPS,
    "run.log_every": 1,
    "run.eval_every": 2,
}
"""Options of the runs that are stopped and go on."""


def assert_same(one, other, where="state"):
    """All that two checkpoints hold is the same to the bit, but for the seconds and the folder."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for name in one.keys() - {"seconds", "dir"}:
            assert_same(one[name], other[name], f"{where}[{name}]")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def assert_same_runs(one, other):
    """Two finished run folders hold the same checkpoints, log and scores."""
    for name in ("last", "best"):
        ours, theirs = (tiny.checkpoint(folder, name) for folder in (one, other))
        assert_same(ours | {"config": None}, theirs | {"config": None})
    rows = [tiny.log(folder) for folder in (one, other)]
    for row in [*rows[0], *rows[1]]:
        for name in ("images_per_second", "memory_MiB", "seconds"):
            row.pop(name, None)
    assert rows[0] == rows[1]
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert results[0]["miou"] == results[1]["miou"]
