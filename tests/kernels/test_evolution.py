"""Mutation keeps the budget, and finds the best set of a toy."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from compresso.errors import ConfigError
from compresso.kernels.evolution import kinds_of, mix_of, mixes_near, mutate, random_set

COSTS = [3, 8] * 6  # attentions and MLPs of six blocks
KINDS = kinds_of(COSTS, range(12))


def cost(removed):
    return sum(COSTS[unit] for unit in removed)


def test_units_of_one_cost_are_one_kind():
    assert KINDS == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]
    assert kinds_of(COSTS, [1, 2, 5]) == [[2], [1, 5]]


def test_mixes_are_as_near_the_target_as_units_allow():
    mixes = mixes_near(KINDS, COSTS, 24.0)
    assert set(mixes) == {(0, 3), (3, 2), (5, 1)}  # 24, 25, 23
    assert mixes_near([[0, 2, 4]], COSTS, 6.1) == [(2,)]


@pytest.mark.parametrize("target", [1.0, 0.2])
def test_less_than_half_a_unit_is_refused(target):
    with pytest.raises(ConfigError, match="less than half a unit"):
        mixes_near(KINDS, COSTS, target)


def test_every_copy_has_a_mix_that_is_allowed():
    random = Random(0)
    mixes = mixes_near(KINDS, COSTS, 24.0)
    removed = random_set(KINDS, mixes[0], random)
    seen = set()
    for _ in range(500):
        changed = mutate(removed, KINDS, mixes, random)
        assert mix_of(changed, KINDS) in mixes
        assert abs(cost(changed) - 24) <= 1
        assert len(changed ^ removed) <= 6 + 4  # three exchanges, and one move between mixes
        seen.add(mix_of(changed, KINDS))
        removed = changed
    assert seen == set(mixes)


def test_one_mix_keeps_the_cost_exactly():
    random = Random(1)
    removed = random_set(KINDS, (3, 2), random)
    for _ in range(200):
        changed = mutate(removed, KINDS, [(3, 2)], random)
        assert cost(changed) == cost(removed) == 25
        assert mix_of(changed, KINDS) == (3, 2)
        removed = changed


def test_evolution_reaches_the_best_of_all_sets():
    """A fitness with couplings, so that removing the cheapest one by one is wrong."""
    random = Random(2)
    alone = {unit: random.random() for unit in range(12)}
    coupled = {pair: random.gauss(0, 0.5) for pair in combinations(range(12), 2)}

    def damage(removed):
        pairs = combinations(sorted(removed), 2)
        return sum(alone[unit] for unit in removed) + sum(coupled[pair] for pair in pairs)

    everything = [
        frozenset((*a, *m)) for a in combinations(KINDS[0], 2) for m in combinations(KINDS[1], 2)
    ]
    best = min(map(damage, everything))
    parent = random_set(KINDS, (2, 2), random)
    for _ in range(60):
        copies = [mutate(parent, KINDS, [(2, 2)], random) for _ in range(16)]
        parent = min([parent, *copies], key=damage)
    assert damage(parent) == best


def test_a_seed_gives_one_history():
    def run(seed):
        random = Random(seed)
        removed = random_set(KINDS, (2, 2), random)
        history = [removed]
        for _ in range(20):
            history.append(mutate(history[-1], KINDS, [(2, 2), (5, 1)], random))
        return history

    assert run(3) == run(3) != run(4)
