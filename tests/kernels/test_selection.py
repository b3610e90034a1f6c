"""Choices on scores small enough to check by hand, and the published ratios of Llama-2-7B."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import torch

from compresso.errors import ConfigError, NumericalError
from compresso.kernels.selection import blocks_for_ratio, closest_run, lowest, tail

LLAMA_2_7B = {"parameters": [202_383_360] * 32, "total": 6_738_415_616}


def test_lowest_scores_come_first_and_ties_go_to_the_shallower():
    assert lowest([0.5, 0.1, 0.3, 0.1, 0.2], 3) == [1, 3, 4]


def test_lowest_has_the_least_sum_of_all_choices():
    scores = torch.rand(8, generator=torch.Generator().manual_seed(0)).tolist()
    best = min(combinations(range(8), 3), key=lambda choice: sum(scores[i] for i in choice))
    assert sorted(lowest(scores, 3)) == list(best)


TRIANGLE = [
    [0.9, 0.2, 0.8, 0.1],  # runs of 1 start at 0 ... 3
    [0.7, 0.6, 0.7],
    [0.5, 0.8],
    [0.9],
]


@pytest.mark.parametrize(("count", "run"), [(1, [3]), (2, [1, 2]), (3, [0, 1, 2])])
def test_closest_run(count, run):
    assert closest_run(TRIANGLE, count) == run


def test_a_run_may_end_at_the_last_block_and_ties_go_to_the_shallower():
    assert closest_run([[0.1, 0.1], [0.5]], 1) == [0]
    assert closest_run([[0.4, 0.4, 0.4], [0.3, 0.2], [0.1]], 2) == [1, 2]


@pytest.mark.parametrize(
    ("blocks", "count", "run"), [(6, 1, [4]), (6, 3, [2, 3, 4]), (6, 5, [0, 1, 2, 3, 4])]
)
def test_tail_keeps_the_last_block(blocks, count, run):
    assert tail(blocks, count) == run


@pytest.mark.parametrize("count", [0, 4, 5])
@pytest.mark.parametrize(
    "choose", [partial(lowest, [1.0] * 4), partial(closest_run, TRIANGLE), partial(tail, 4)]
)
def test_a_block_must_stay(choose, count):
    with pytest.raises(ConfigError, match=f"cannot remove {count} of 4 blocks") as raised:
        choose(count)
    assert raised.value.hint == "at least one block must stay"


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(NumericalError, match="score of block `1` is not finite"):
        lowest([0.0, float("nan"), 1.0], 1)
    with pytest.raises(NumericalError, match="score of block `0` is not finite"):
        closest_run([[float("nan"), 0.0], [0.0]], 1)


@pytest.mark.parametrize(("count", "share"), [(7, "21.02"), (9, "27.03")])
def test_the_ratio_is_of_all_parameters(count, share):
    chosen = blocks_for_ratio(partial(tail, 32), **LLAMA_2_7B, ratio=float(share) / 100)
    assert len(chosen) == count
    assert f"{100 * count * 202_383_360 / 6_738_415_616:.2f}" == share


@pytest.mark.parametrize(
    ("ratio", "count"), [(0.2, 7), (0.25, 8), (0.3, 10), (0.016, 1), (0.93, 31)]
)
def test_the_nearest_count_is_taken(ratio, count):
    assert blocks_for_ratio(partial(tail, 32), **LLAMA_2_7B, ratio=ratio) == tail(32, count)


def test_of_two_counts_as_near_the_smaller_is_taken():
    chosen = blocks_for_ratio(partial(tail, 4), [1, 1, 1, 1], total=4, ratio=0.375)
    assert chosen == [2]


def test_blocks_of_different_sizes():
    parameters = [10, 10, 40, 10, 10]
    order = partial(lowest, [0.9, 0.3, 0.1, 0.2, 0.8])  # 2, 3, 1, ...: 40, 50, 60 of 100
    assert blocks_for_ratio(order, parameters, total=100, ratio=0.54) == [2, 3]
    assert blocks_for_ratio(order, parameters, total=100, ratio=0.56) == [2, 3, 1]
    assert blocks_for_ratio(order, parameters, total=100, ratio=0.21) == [2]
    run = partial(closest_run, [[1, 1, 1, 0, 1], [1, 1, 0, 1], [1, 1, 0], [0, 1], [1]])
    assert blocks_for_ratio(run, parameters, total=100, ratio=0.4) == [2, 3]
    assert blocks_for_ratio(run, parameters, total=100, ratio=0.1) == [3]


def test_a_ratio_of_no_block_or_all_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"0\.01 is less than half a block") as raised:
        blocks_for_ratio(partial(tail, 32), **LLAMA_2_7B, ratio=0.01)
    assert raised.value.hint == "the smallest possible ratio is 0.0300, one block"
    with pytest.raises(ConfigError, match=r"0\.95 leaves no block") as raised:
        blocks_for_ratio(partial(tail, 32), **LLAMA_2_7B, ratio=0.95)
    assert raised.value.hint == "the largest possible ratio is 0.9311, all blocks but one"
    with pytest.raises(ConfigError, match="a model of one block has none to remove"):
        blocks_for_ratio(partial(tail, 1), [5], total=10, ratio=0.3)
