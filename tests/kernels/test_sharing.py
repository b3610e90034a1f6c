"""Slots against the examples of the paper, groups against every choice there is."""

from __future__ import annotations

from itertools import combinations
from math import inf, nan

import pytest
import torch

from compresso.errors import ConfigError, NumericalError
from compresso.kernels.sharing import (
    Run,
    average,
    cheapest_groups,
    lower,
    mean,
    runs,
    stepwise,
    stepwise_from_start,
)


@pytest.mark.parametrize(
    ("blocks", "slots", "made_from"),
    [
        (18, 9, [0, 2, 4, 6, 9, 11, 13, 15, 17]),
        (6, 3, [0, 3, 5]),
        (5, 3, [0, 2, 4]),
        (7, 2, [0, 6]),
        (7, 1, [0]),
        (4, 3, [0, 2, 3]),
    ],
)
def test_stepwise_goes_from_the_first_block_to_the_last(blocks, slots, made_from):
    assert stepwise(blocks, slots) == [(block,) for block in made_from]


@pytest.mark.parametrize(
    ("blocks", "slots", "made_from"),
    [(18, 9, list(range(0, 18, 2))), (6, 2, [0, 3]), (7, 3, [0, 2, 4]), (4, 1, [0])],
)
def test_stepwise_from_the_start_takes_even_steps(blocks, slots, made_from):
    assert stepwise_from_start(blocks, slots) == [(block,) for block in made_from]


@pytest.mark.parametrize("init", [stepwise, stepwise_from_start, lower])
def test_no_block_makes_two_slots(init):
    for blocks in range(2, 20):
        for slots in range(1, blocks):
            made_from = [block for (block,) in init(blocks, slots)]
            assert made_from == sorted(set(made_from)) and made_from[0] == 0
            assert len(made_from) == slots and made_from[-1] < blocks


def test_lower_takes_the_first_blocks():
    assert lower(6, 2) == [(0,), (1,)]


def test_average_is_of_the_blocks_that_use_the_slot():
    assert average(6, 2) == [(0, 2, 4), (1, 3, 5)]
    assert average(7, 3) == [(0, 3, 6), (1, 4), (2, 5)]  # the last round ends early


@pytest.mark.parametrize("slots", [0, 4, 5])
@pytest.mark.parametrize("init", [stepwise, stepwise_from_start, lower, average])
def test_something_must_be_shared(init, slots):
    with pytest.raises(ConfigError, match=f"{slots} sets of weights cannot be shared") as raised:
        init(4, slots)
    assert raised.value.hint == "use 1 to 3"


@pytest.mark.parametrize("count", range(1, 10))
def test_mean(count):
    torch.manual_seed(0)
    tensors = list(torch.randn(count, 5, 7))
    torch.testing.assert_close(mean(tensors), torch.stack(tensors).mean(0))
    assert torch.equal(mean([tensors[0]] * count), tensors[0])
    assert mean(tensor.bfloat16() for tensor in tensors).dtype == torch.float32


def test_mean_changes_nothing_it_is_given():
    first = torch.ones(3)
    mean([first, torch.zeros(3)])
    assert torch.equal(first, torch.ones(3))


def test_runs_leave_out_protected_blocks():
    assert runs(4, largest=3) == [(0, 2), (1, 2), (2, 2), (0, 3), (1, 3)]
    assert runs(5, largest=3, protected=(0, 4)) == [(1, 2), (2, 2), (1, 3)]
    assert runs(5, largest=1) == []
    assert list(Run(2, 3).blocks) == [2, 3, 4]


def by_force(damage, removed):
    """The least sum over all sets of runs that do not overlap and remove so many."""
    best = inf
    for count in range(removed + 1):
        for chosen in combinations(damage, count):
            blocks = [block for run in chosen for block in run.blocks]
            if len(blocks) == len(set(blocks)) and len(blocks) - count == removed:
                best = min(best, sum(damage[run] for run in chosen))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("largest", [2, 3, 4])
@pytest.mark.parametrize("protected", [(), (0, 6), (3,)])
def test_groups_are_the_cheapest_of_all_choices(seed, largest, protected):
    generator = torch.Generator().manual_seed(seed)
    allowed = runs(7, largest=largest, protected=protected)
    damage = {run: torch.rand((), generator=generator).item() * run.size for run in allowed}
    for removed in range(5):
        expected = by_force(damage, removed)
        if expected == inf:
            with pytest.raises(ConfigError, match=f"cannot free {removed} of 7 blocks"):
                cheapest_groups(damage, blocks=7, removed=removed)
            continue
        groups = cheapest_groups(damage, blocks=7, removed=removed)
        assert sum(damage[run] for run in groups) == pytest.approx(expected)
        assert sum(run.size - 1 for run in groups) == removed
        covered = [block for run in groups for block in run.blocks]
        assert covered == sorted(set(covered)) and not set(covered) & set(protected)


def test_greedy_would_be_worse():
    damage = {Run(0, 2): 2.0, Run(1, 2): 1.0, Run(2, 2): 2.0}
    assert cheapest_groups(damage, blocks=4, removed=1) == [Run(1, 2)]
    assert cheapest_groups(damage, blocks=4, removed=2) == [Run(0, 2), Run(2, 2)]


def test_groups_of_one_share_nothing():
    assert cheapest_groups({}, blocks=5, removed=0) == []
    with pytest.raises(ConfigError) as raised:
        cheapest_groups({Run(1, 3): 1.0}, blocks=5, removed=3)
    assert "they can free 2 at most" in raised.value.hint


@pytest.mark.parametrize("value", [nan, inf])
def test_damage_must_be_finite(value):
    with pytest.raises(NumericalError, match="blocks 1 to 3 is not finite"):
        cheapest_groups({Run(1, 3): value}, blocks=5, removed=2)
