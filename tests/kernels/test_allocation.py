"""Against trying everything, and what must hold of every choice."""

from __future__ import annotations

from itertools import pairwise, product
from random import Random

import pytest
import torch

from compresso.kernels.allocation import (
    in_order,
    least_damage,
    spread,
    switched,
    total,
    uniform,
)


def tables(seed, groups=6, levels=3):
    random = Random(seed)
    sizes, damage = [], []
    for _ in range(groups):
        steps = [random.randint(1, 60) for _ in range(levels)]
        sizes.append([sum(steps[: level + 1]) for level in range(levels)])
        damage.append([random.random() for _ in range(levels)])  # need not fall
    return damage, sizes


def lost(damage, levels):
    return sum(group[level] for group, level in zip(damage, levels, strict=True))


def brute(damage, sizes, budget):
    choices = product(*(range(len(group)) for group in sizes))
    return min(lost(damage, c) for c in choices if total(sizes, c) <= budget)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_that_fits_is_better(seed):
    damage, sizes = tables(seed)
    least, most = total(sizes, [0] * 6), total(sizes, [2] * 6)
    for budget in range(least, most + 20, 17):
        levels = least_damage(damage, sizes, budget)
        assert total(sizes, levels) <= budget
        assert lost(damage, levels) == pytest.approx(brute(damage, sizes, budget), rel=1e-12)


def test_large_sizes_without_a_common_divisor():
    damage, _ = tables(3)
    sizes = [
        [s + 7 * group for s in (10**11 + 3, 2 * 10**11 + 1, 4 * 10**11)] for group in range(6)
    ]
    for budget in (6 * 10**11 + 10**6, 13 * 10**11, 17 * 10**11):
        levels = least_damage(damage, sizes, budget)
        assert total(sizes, levels) <= budget
        assert lost(damage, levels) == pytest.approx(brute(damage, sizes, budget))


def test_the_paper_s_example():
    """Two layers, slopes 10 and 1, grids of 2 and 4 bits: at 3 bits the first gets 4."""
    damage = [[slope * error for error in (0.1175, 0.0095)] for slope in (10, 1)]
    assert least_damage(damage, [[2, 4], [2, 4]], 6) == [1, 0]


def test_more_room_never_costs():
    damage, sizes = tables(7, groups=10)
    losses = [
        lost(damage, least_damage(damage, sizes, budget))
        for budget in range(total(sizes, [0] * 10), total(sizes, [2] * 10), 5)
    ]
    assert all(later <= earlier for earlier, later in pairwise(losses))


def test_a_model_of_many_groups_is_quick():
    """32 blocks of four groups, as Llama-2-7B has them, at 2, 3, 4 and 8 bits."""
    weights = [3 * 4096**2, 4096**2, 2 * 4096 * 11008, 4096 * 11008] * 32
    sizes = [[count * bits // 8 + count // 32 for bits in (2, 3, 4, 8)] for count in weights]
    random = Random(0)
    damage = [[random.random() * 4.0**-bits for bits in (2, 3, 4, 8)] for _ in weights]
    budget = sum(sizes[group][1] for group in range(128))
    levels = least_damage(damage, sizes, budget)
    assert 0.999 * budget < total(sizes, levels) <= budget
    assert lost(damage, levels) < lost(damage, [1] * 128)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="the least size, 4, is over 3"):
        least_damage([[1.0], [1.0]], [[2], [2]], 3)
    with pytest.raises(ValueError, match="the least size, 4, is over 3"):
        uniform([[2, 3], [2, 3]], 3)
    with pytest.raises(ValueError, match="not finite"):
        least_damage([[float("nan")]], [[2]], 3)


def test_uniform_and_in_order():
    sizes = [[2, 3, 4], [4, 6, 8], [2, 3, 4]]
    assert uniform(sizes, 15) == [1, 1, 1]
    assert in_order([1, 2, 0], sizes, 12) == [1, 1, 1]
    assert in_order([1, 2, 0], sizes, 13) == [1, 1, 2]  # the first of the order does not fit
    assert in_order([1, 2, 0], sizes, 14) == [1, 2, 1]
    assert in_order([0, 1, 2], sizes, 15) == [2, 2, 1]
    assert in_order([0, 1, 2], sizes, 100) == [2, 2, 2]


@pytest.mark.parametrize("seed", range(6))
def test_switches_keep_the_budget_and_waste_no_step(seed):
    _, sizes = tables(seed, groups=12, levels=4)
    budget = (total(sizes, [0] * 12) + total(sizes, [3] * 12)) // 2
    random = Random(seed)
    levels = uniform(sizes, budget)
    seen = set()
    for _ in range(200):
        levels = switched(levels, sizes, budget, random)
        left = budget - total(sizes, levels)
        assert left >= 0
        steps = [
            group[level + 1] - group[level]
            for group, level in zip(sizes, levels, strict=True)
            if level < 3
        ]
        assert min(steps) > left
        seen.add(tuple(levels))
    assert len(seen) > 100


def test_switches_are_drawn_from_the_seed_and_change_nothing_given():
    _, sizes = tables(1, groups=12, levels=4)
    budget = total(sizes, [1] * 12)
    levels = [1] * 12
    first = [switched(levels, sizes, budget, Random(seed)) for seed in range(20)]
    assert first == [switched(levels, sizes, budget, Random(seed)) for seed in range(20)]
    assert levels == [1] * 12
    assert len({tuple(found) for found in first}) > 5


def test_switches_among_equal_sizes_change_few_groups():
    sizes = [[2, 3, 4]] * 10
    for seed in range(50):
        found = switched([1] * 10, sizes, 30, Random(seed))
        assert sum(found) == 10
        assert sum(level != 1 for level in found) <= 6


def test_with_nothing_to_switch():
    assert switched([2, 2], [[1, 2, 3]] * 2, 6, Random(0)) == [2, 2]
    assert switched([0, 0], [[1, 2, 3]] * 2, 2, Random(0)) == [0, 0]


def falling(seed, groups=4, steps=4):
    generator = torch.Generator().manual_seed(seed)
    gains = torch.rand(groups, steps, generator=generator).sort(dim=1, descending=True).values
    return list(gains), torch.randint(1, 9, (groups,), generator=generator).tolist()


@pytest.mark.parametrize("seed", range(8))
def test_spreading_is_the_best_but_for_what_the_last_step_leaves(seed):
    gains, costs = falling(seed)
    for budget in range(0, 4 * sum(costs) + 1, 7):
        taken = spread(gains, costs, budget)
        used = sum(count * cost for count, cost in zip(taken, costs, strict=True))
        assert used <= budget
        gained = sum(float(gain[:n].sum()) for gain, n in zip(gains, taken, strict=True))
        best = max(
            sum(float(gain[:n].sum()) for gain, n in zip(gains, counts, strict=True))
            for counts in product(range(5), repeat=4)
            if sum(n * cost for n, cost in zip(counts, costs, strict=True)) <= budget
        )
        largest = max(float(gain[0]) for gain in gains)
        assert best - largest <= gained <= best + 1e-6
        left = [c for n, c in zip(taken, costs, strict=True) if n < 4]
        assert used + min(left, default=budget + 1) > budget


def test_steps_that_gain_nothing_are_not_taken():
    gains = [torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0]), torch.tensor([])]
    assert spread(gains, [2, 1, 1], 100) == [1, 0, 0]
    assert spread(gains, [2, 1, 1], 1) == [0, 0, 0]
    assert spread([], [], 5) == []
