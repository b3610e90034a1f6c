"""Sets of units to remove, and how evolution changes them within a fixed budget.

A kind is a set of units that cost the same, such as all attentions; a mix says how many units of
each kind are removed. Exchanging units of one kind leaves the budget exactly as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import inf
from random import Random

from compresso.errors import ConfigError

MOST_EXCHANGES = 3
MIX_CHANGES = 0.25  # share of the copies that change kind against kind, where that is possible

Mix = tuple[int, ...]


def kinds_of(costs: Sequence[int], free: Sequence[int]) -> list[list[int]]:
    """Free units by what they cost, the cheapest kind first, units ascending.

    costs: parameters of every unit. free: units that may be removed.
    """
    return [
        [unit for unit in free if costs[unit] == cost]
        for cost in sorted({costs[unit] for unit in free})
    ]


def mixes_near(kinds: Sequence[Sequence[int]], costs: Sequence[int], target: float) -> list[Mix]:
    """All mixes whose cost is within half the cheapest unit of `target`, else the nearest ones.

    target: parameters to remove.

    Raises ConfigError if the nearest mix removes nothing or everything.
    """
    prices = [costs[kind[0]] for kind in kinds]
    mixes = list(product(*(range(len(kind) + 1) for kind in kinds)))
    gaps = [abs(sum(n * p for n, p in zip(mix, prices, strict=True)) - target) for mix in mixes]
    limit = max(min(gaps, default=inf), min(prices, default=0) / 2)
    found = [mix for mix, gap in zip(mixes, gaps, strict=True) if gap <= limit]
    nearest = min(zip(gaps, mixes, strict=True), default=(inf, ()))[1]
    if not any(nearest):
        raise ConfigError(f"{target:.0f} parameters are less than half a unit")
    whole = tuple(len(kind) for kind in kinds)
    return [mix for mix in found if any(mix) and mix != whole] or [nearest]


def random_set(kinds: Sequence[Sequence[int]], mix: Mix, random: Random) -> frozenset[int]:
    """A random set of units to remove with this mix."""
    chosen = [random.sample(list(kind), count) for kind, count in zip(kinds, mix, strict=True)]
    return frozenset(unit for units in chosen for unit in units)


def mutate(
    removed: frozenset[int],
    kinds: Sequence[Sequence[int]],
    mixes: Sequence[Mix],
    random: Random,
) -> frozenset[int]:
    """A copy in which a few units changed places, with a mix among `mixes`.

    One to three exchanges, fewer being likelier, of a removed unit for a kept one of the same kind.
    Sometimes the mix moves to a neighbour first: units of one kind come back, others go.

    Source: Sieberling et al., arXiv:2410.14649, level-switch mutation; moving between mixes, where
    removals of different kinds come to the same budget, is ours.
    """
    changed = removed
    if len(mixes) > 1 and random.random() < MIX_CHANGES:
        changed = _move(changed, kinds, _neighbour(mix_of(changed, kinds), mixes, random), random)
    exchanges = min(random.randint(1, MOST_EXCHANGES), random.randint(1, MOST_EXCHANGES))
    for _ in range(exchanges):
        open_kinds = [kind for kind in kinds if 0 < len(changed.intersection(kind)) < len(kind)]
        if not open_kinds:
            break
        kind = random.choice(open_kinds)
        back = random.choice(sorted(changed.intersection(kind)))
        gone = random.choice(sorted(set(kind) - changed))
        changed = changed - {back} | {gone}
    return changed


def mix_of(removed: frozenset[int], kinds: Sequence[Sequence[int]]) -> Mix:
    """How many units of each kind are removed."""
    return tuple(len(removed.intersection(kind)) for kind in kinds)


def _neighbour(mix: Mix, mixes: Sequence[Mix], random: Random) -> Mix:
    ordered = sorted(mixes)
    place = ordered.index(mix)
    return random.choice(ordered[max(0, place - 1) : place] + ordered[place + 1 : place + 2])


def _move(
    removed: frozenset[int], kinds: Sequence[Sequence[int]], mix: Mix, random: Random
) -> frozenset[int]:
    """The set with another mix: as few units as possible come back or go."""
    changed = removed
    for kind, count in zip(kinds, mix, strict=True):
        gone = changed.intersection(kind)
        if len(gone) > count:
            changed -= frozenset(random.sample(sorted(gone), len(gone) - count))
        else:
            kept = sorted(set(kind) - gone)
            changed |= frozenset(random.sample(kept, count - len(gone)))
    return changed
