"""Which blocks use the same weights, and what these are made from.

Blocks are numbered from 0. A looped model of `slots` sets of weights runs them in turn, over and
over: block l uses slot l modulo `slots`. If `slots` does not divide the number of blocks, the last
round ends early, and the later slots are used once less than the others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from math import isfinite
from typing import NamedTuple

from torch import Tensor

from compresso.errors import ConfigError, NumericalError


class Run(NamedTuple):
    """So many adjacent blocks."""

    first: int
    size: int

    @property
    def blocks(self) -> range:
        """All of them."""
        return range(self.first, self.first + self.size)


def stepwise(blocks: int, slots: int) -> list[tuple[int, ...]]:
    """The block every slot is made from: at even steps from the first block to the last.

    A single slot is made from the first. Raises ConfigError if nothing would be shared.

    Source: Bae et al., arXiv:2410.20672, "Stepwise" with fixed ends.
    """
    _check_slots(slots, blocks=blocks)
    steps = max(1, slots - 1)
    return [((2 * slot * (blocks - 1) + steps) // (2 * steps),) for slot in range(slots)]


def stepwise_from_start(blocks: int, slots: int) -> list[tuple[int, ...]]:
    """The block every slot is made from: the first, and on at even steps, one as long as a round is
    often.

    Raises ConfigError as `stepwise`.

    Source: Bae et al., arXiv:2410.20672, "Stepwise" with a fixed start.
    """
    _check_slots(slots, blocks=blocks)
    return [(slot * blocks // slots,) for slot in range(slots)]


def lower(blocks: int, slots: int) -> list[tuple[int, ...]]:
    """The block every slot is made from: the first ones. Raises ConfigError as `stepwise`.

    Source: Bae et al., arXiv:2410.20672, "Lower".
    """
    _check_slots(slots, blocks=blocks)
    return [(slot,) for slot in range(slots)]


def average(blocks: int, slots: int) -> list[tuple[int, ...]]:
    """The blocks every slot is the mean of: all that use it. Raises ConfigError as `stepwise`.

    Source: Bae et al., arXiv:2410.20672, "Average".
    """
    _check_slots(slots, blocks=blocks)
    return [tuple(range(slot, blocks, slots)) for slot in range(slots)]


def mean(tensors: Iterable[Tensor]) -> Tensor:
    """The mean of tensors of one shape, in float32: exactly the first if all are equal.

    tensors: at least one, of any floating type. Not modified.
    """
    remaining = iter(tensors)
    total = next(remaining).float().clone()
    for number, tensor in enumerate(remaining, start=2):
        total.lerp_(tensor.float(), 1 / number)
    return total


def runs(blocks: int, *, largest: int, protected: Collection[int] = ()) -> list[Run]:
    """All runs of 2 to `largest` adjacent blocks that hold none of the `protected` ones."""
    found = (
        Run(first, size) for size in range(2, largest + 1) for first in range(blocks - size + 1)
    )
    return [run for run in found if not set(run.blocks) & set(protected)]


def cheapest_groups(damage: Mapping[Run, float], *, blocks: int, removed: int) -> list[Run]:
    """The runs to fold, in order: of all choices that leave `removed` blocks without weights of
    their own, the one whose damages have the least sum.

    A run of n blocks that share one set of weights removes n - 1. No two runs overlap. The sum is
    what the choice is predicted to cost, as if runs did not act on each other.

    damage: of every run that may be folded, any unit.
    blocks: in the model.

    Raises ConfigError if these runs cannot remove so many, NumericalError if a damage is not
    finite.

    Source: the idea of groups of adjacent blocks is FoldGPT's, Liu et al., arXiv:2407.00928; the
    choice among them by dynamic programming is ours.
    """
    for run, cost in damage.items():
        if not isfinite(cost):
            raise NumericalError(f"the damage of sharing blocks {_listed(run)} is not finite")
    # The best choice among the first n blocks for every number removed there.
    best: list[dict[int, tuple[float, tuple[Run, ...]]]] = [{0: (0.0, ())}]
    for end in range(1, blocks + 1):
        here = dict(best[-1])
        for run, cost in damage.items():
            if run.first + run.size != end:
                continue
            for before, (sum_before, chosen) in best[run.first].items():
                option = (sum_before + cost, (*chosen, run))
                count = before + run.size - 1
                here[count] = min(here.get(count, option), option)
        best.append(here)
    if removed not in best[-1]:
        raise ConfigError(
            f"groups of adjacent blocks cannot free {removed} of {blocks} blocks",
            hint=f"they can free {max(best[-1])} at most, with the sizes and blocks allowed",
        )
    return list(best[-1][removed][1])


def _check_slots(slots: int, *, blocks: int) -> None:
    if not 1 <= slots < blocks:
        raise ConfigError(
            f"{slots} sets of weights cannot be shared by {blocks} blocks",
            hint=f"use 1 to {blocks - 1}",
        )


def _listed(run: Run) -> str:
    return f"{run.first} to {run.first + run.size - 1}"
