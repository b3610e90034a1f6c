"""Which level every group of weights gets, so that all of them fit a budget.

`sizes[group][level]` is what a group takes at a level, in whole units such as bytes, and rises with
the level. `damage[group][level]` is what is lost there, all others being whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

MOST_SWITCHES = 3
EQUAL_SWITCHES = 0.5  # share of the exchanges that are made between groups of one size, if any are

Table = Sequence[Sequence[int]]


def total(sizes: Table, levels: Sequence[int]) -> int:
    """What the groups take at these levels."""
    return sum(group[level] for group, level in zip(sizes, levels, strict=True))


def least_damage(damage: Sequence[Sequence[float]], sizes: Table, budget: int) -> list[int]:
    """The levels of least total damage among all that take at most `budget`, exactly.

    Groups are added one after another, and of all choices so far only those are kept that no other
    beats in both size and damage. Sizes of real models have few different sums, so few are kept.

    Raises ValueError if the lowest levels are over the budget, or a damage is not finite.

    Source: dynamic programming for the multiple-choice knapsack problem, as in Malinovskii et al.,
    arXiv:2411.17525, section 5.
    """
    lowest = [min(group) for group in sizes]
    if sum(lowest) > budget:
        raise ValueError(f"the least size, {sum(lowest)}, is over {budget}")
    losses = [torch.tensor(group, dtype=torch.float64) for group in damage]
    if not all(bool(torch.isfinite(group).all()) for group in losses):
        raise ValueError("a damage is not finite")
    room = budget - sum(lowest)
    taken, lost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    steps: list[tuple[Tensor, Tensor]] = []
    for group, least, loss in zip(sizes, lowest, losses, strict=True):
        extra = torch.tensor(group, dtype=torch.int64) - least
        sums = (taken[:, None] + extra).flatten()
        losts = (lost[:, None] + loss).flatten()
        kept = _front(sums, losts, room)
        taken, lost = sums[kept], losts[kept]
        width = len(group)
        steps.append((kept // width, (kept % width).to(torch.int32)))
    place = int(lost.argmin())
    levels = []
    for before, chosen in reversed(steps):
        levels.append(int(chosen[place]))
        place = int(before[place])
    return levels[::-1]


def _front(sums: Tensor, losts: Tensor, room: int) -> Tensor:
    """Places of the choices within `room` that no other beats, by rising size."""
    fits = torch.nonzero(sums <= room).flatten()
    order = fits[losts[fits].argsort(stable=True)]
    order = order[sums[order].argsort(stable=True)]
    sorted_losts = losts[order]
    best = sorted_losts.cummin(0).values
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = sorted_losts[1:] < best[:-1]
    return order[better]


def spread(gains: Sequence[Tensor], costs: Sequence[int], budget: int) -> list[int]:
    """How many steps every group takes within a budget, so that they gain most.

    gains:  of every group, what each further step gains, (steps,), falling and not negative.
    costs:  what a step of each group takes, in whole units such as bytes, at least 1.

    The steps that gain most for what they take come first, which is the best there is but for what
    the last one leaves of the budget. Steps that gain nothing are not taken.
    """
    if not costs:
        return []
    worth = torch.cat([gain.double() / cost for gain, cost in zip(gains, costs, strict=True)])
    groups = [group for group, gain in enumerate(gains) for _ in gain]
    taken, left, least = [0] * len(costs), budget, min(costs)
    for step in worth.argsort(descending=True, stable=True).tolist():
        if left < least or not worth[step] > 0:
            break
        if costs[groups[step]] <= left:
            taken[groups[step]] += 1
            left -= costs[groups[step]]
    return taken


def uniform(sizes: Table, budget: int) -> list[int]:
    """The highest level that all groups can have.

    Raises ValueError if the lowest is over the budget.
    """
    fitting = [level for level in range(len(sizes[0])) if _all_at(sizes, level) <= budget]
    if not fitting:
        raise ValueError(f"the least size, {_all_at(sizes, 0)}, is over {budget}")
    return [max(fitting)] * len(sizes)


def in_order(order: Sequence[int], sizes: Table, budget: int) -> list[int]:
    """The highest level that all can have, and the next one for the first of an order that fit.

    order: groups, the most important first.

    Raises ValueError as `uniform` does.

    Source: Dumitru et al., arXiv:2406.17415, with two neighbouring levels.
    """
    levels = uniform(sizes, budget)
    left = budget - total(sizes, levels)
    for group in order:
        higher = levels[group] + 1
        if higher < len(sizes[group]):
            step = sizes[group][higher] - sizes[group][levels[group]]
            if step <= left:
                levels[group] = higher
                left -= step
    return levels


def switched(levels: Sequence[int], sizes: Table, budget: int, random: Random) -> list[int]:
    """A copy in which a few groups went up a level, and others down to make room.

    levels: of every group, within the budget. Not modified.

    One to three switches, fewer being likelier. A switch between groups whose steps are the same
    leaves the size as it is; otherwise one group goes down where one is enough, and what is left of
    its room goes to others. The copy is within the budget, and no group could go up a level more.

    Source: Sieberling et al., arXiv:2410.14649, level-switch mutation within groups of one size;
    switching between sizes is ours.
    """
    changed = list(levels)
    for _ in range(min(random.randint(1, MOST_SWITCHES), random.randint(1, MOST_SWITCHES))):
        _switch(changed, sizes, budget, random)
    _fill(changed, sizes, budget, random)
    return changed


def _switch(levels: list[int], sizes: Table, budget: int, random: Random) -> None:
    rising = [group for group, level in enumerate(levels) if level + 1 < len(sizes[group])]
    if not rising:
        return
    up = random.choice(rising)
    gained = _step(sizes, up, levels[up])
    needed = total(sizes, levels) + gained - budget
    falling = [group for group, level in enumerate(levels) if level and group != up]
    freed = {group: _step(sizes, group, levels[group] - 1) for group in falling}
    if needed > sum(freed.values()):
        return
    levels[up] += 1
    while needed > 0:
        enough = [group for group, room in freed.items() if room >= needed]
        alike = [group for group in enough if freed[group] == gained]
        if alike and random.random() < EQUAL_SWITCHES:
            enough = alike
        down = random.choice(enough or list(freed))
        levels[down] -= 1
        needed -= freed.pop(down)


def _fill(levels: list[int], sizes: Table, budget: int, random: Random) -> None:
    """Let groups go up while any fits."""
    left = budget - total(sizes, levels)
    while True:
        fitting = [
            group
            for group, level in enumerate(levels)
            if level + 1 < len(sizes[group]) and _step(sizes, group, level) <= left
        ]
        if not fitting:
            return
        up = random.choice(fitting)
        left -= _step(sizes, up, levels[up])
        levels[up] += 1


def _step(sizes: Table, group: int, level: int) -> int:
    """What a group takes more at the level after `level`."""
    return sizes[group][level + 1] - sizes[group][level]


def _all_at(sizes: Table, level: int) -> int:
    return sum(group[level] for group in sizes)
