from collections import Counter

import pytest

from pseudoseg_fast.data.sampler import StepSampler


def indices(batches):
    return [index for batch in batches for index, _ in batch]


def test_every_pass_is_a_new_permutation():
    drawn = indices(StepSampler(length=7, batch_size=3, seed=0, steps=7))
    passes = [drawn[:7], drawn[7:14], drawn[14:]]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("start", [1, 5, 9, 10])
def test_start_changes_no_later_batch(start):
    whole = list(StepSampler(length=4, batch_size=3, seed=5, steps=10))
    late = StepSampler(length=4, batch_size=3, seed=5, steps=10, start_step=start)
    assert list(late) == whole[start:]
    assert len(late) == 10 - start


def test_steps_change_no_batch():
    short = list(StepSampler(length=4, batch_size=3, seed=5, steps=3))
    assert list(StepSampler(length=4, batch_size=3, seed=5, steps=9))[:3] == short


def test_batch_larger_than_the_set_repeats():
    batch = next(iter(StepSampler(length=3, batch_size=8, seed=0, steps=1)))
    assert sorted(Counter(index for index, _ in batch).values()) == [2, 3, 3]
    assert len({seed for _, seed in batch}) == 8


def test_ranks_share_the_batch_of_one():
    whole = list(StepSampler(length=11, batch_size=4, seed=3, steps=6))
    halves = [list(StepSampler(11, 2, seed=3, steps=6, rank=rank, world_size=2)) for rank in range(2)]
    assert [first + second for first, second in zip(*halves, strict=True)] == whole


def test_seeds_differ():
    first, second = (list(StepSampler(length=50, batch_size=8, seed=seed, steps=4)) for seed in (0, 1))
    assert indices(first) != indices(second)
    assert {seed for batch in first for _, seed in batch}.isdisjoint(
        seed for batch in second for _, seed in batch
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        pytest.param({"length": 0}, "length and batch_size", id="empty"),
        pytest.param({"start_step": 11}, "start_step must be 0 to steps = 10", id="start"),
        pytest.param({"rank": 2, "world_size": 2}, "rank must be 0 to world_size - 1 = 1", id="rank"),
    ],
)
def test_wrong_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        StepSampler(**{"length": 4, "batch_size": 2, "seed": 0, "steps": 10, **options})
