"""The settings of the methods that drop or share blocks. Imports no torch."""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Literal, Self

from compresso.config import checked, limit, settings

ENDS = ("first", "last")  # names of blocks


def one_of(**amounts: object) -> None:
    """Raises ValueError unless exactly one is not None."""
    given = [name for name, value in amounts.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"give only one of {', '.join(f'`{name}`' for name in given)}")
    if not given:
        raise ValueError(f"give one of {', '.join(f'`{name}`' for name in amounts)}")


def check_protect(protect: tuple[int | str, ...]) -> None:
    """Raises ValueError for a word that names no block."""
    for place in protect:
        if isinstance(place, str) and place not in ENDS:
            near = difflib.get_close_matches(place, ENDS)
            meant = f"; did you mean `{near[0]}`?" if near else ""
            raise ValueError(f"`protect`: `{place}` is neither `first`, `last` nor a block{meant}")


Ratio = Annotated[
    float | None,
    limit(gt=0, lt=1, description="Share of all parameters to remove, as near as units allow."),
]
BlockCount = Annotated[int | None, limit(ge=1, description="Number of blocks to remove.")]
DropCount = Annotated[
    int | None, limit(ge=1, description="Number of units to remove: blocks, or halves of blocks.")
]
Unit = Annotated[
    Literal["sub-block", "attention", "mlp", "block"],
    limit(
        description="What is removed at once: the attention or the MLP of a block (`sub-block`),"
        " only attentions, only MLPs, or whole blocks."
    ),
]
Protect = Annotated[
    tuple[int | str, ...],
    limit(description="Blocks to leave alone: `first`, `last` or their numbers."),
]
Keep = Annotated[tuple[int, ...], limit(description="More blocks to leave alone, by number.")]
Seed = Annotated[int, limit(ge=0, description="Seed of every random choice.")]
AngleTokens = Annotated[
    Literal["all", "last"],
    limit(description="Tokens the angular distance is averaged over; the paper uses `last`."),
]
ScoredTokens = Annotated[
    int, limit(ge=1, description="Calibration tokens that every candidate is scored on.")
]


@settings
class BlockAmount:
    """How many blocks to remove."""

    ratio: Ratio = None
    blocks: BlockCount = None

    @checked
    def _check_amount(self) -> Self:
        one_of(ratio=self.ratio, blocks=self.blocks)
        return self


@settings
class Protection:
    """Which blocks to leave alone."""

    protect: Protect = ()
    keep: Keep = ()

    @checked
    def _check_protect(self) -> Self:
        check_protect(self.protect)
        return self


@settings
class UnitAmount(Protection):
    """How many units to remove, and what a unit is."""

    ratio: Ratio = None
    drop_count: DropCount = None
    unit: Unit = "block"

    @checked
    def _check_amount(self) -> Self:
        one_of(ratio=self.ratio, drop_count=self.drop_count)
        return self


@settings
class ShortGptSettings(Protection, BlockAmount):
    """Dropping the blocks of lowest Block Influence, all at once."""


@settings
class ContiguousSettings(BlockAmount):
    """Dropping the run of blocks whose input and output are closest in angle."""

    tokens: AngleTokens = "all"


@settings
class TailSettings(BlockAmount):
    """Dropping the deepest blocks but the last. Needs no data."""


@settings
class ManualSettings:
    """Dropping what is named. Needs no data."""

    drop: Annotated[
        list[int | str] | None,
        limit(
            min_length=1,
            description="Blocks to remove, from 0; `a3` is only the attention of block 3, `m3` only"
            " its MLP.",
        ),
    ] = None
    order: Annotated[
        str | None,
        limit(description="A pruned checkpoint: remove the first of what it lost, by its search."),
    ] = None
    ratio: Ratio = None
    drop_count: DropCount = None

    @checked
    def _check(self) -> Self:
        one_of(drop=self.drop, order=self.order)
        if self.order is not None:
            one_of(ratio=self.ratio, drop_count=self.drop_count)
        elif self.ratio is not None or self.drop_count is not None:
            raise ValueError("`ratio` and `drop_count` are for `order`; `drop` says all")
        for name in self.drop or ():
            if isinstance(name, str) and not re.fullmatch(r"[am]\d+", name):
                raise ValueError(f"`drop`: `{name}` is not a block, `a` or `m` and a block")
        return self


@settings
class BlockPrunerSettings(UnitAmount):
    """Dropping, again and again, what raises the perplexity of what is left least."""

    unit: Unit = "sub-block"
    metric: Annotated[
        Literal["perplexity", "kl"],
        limit(
            description="What is kept low: perplexity, as in the paper, or KL from the original."
        ),
    ] = "perplexity"
    score_tokens: ScoredTokens = 16384


@settings
class LlmDropSettings(UnitAmount):
    """Dropping the attentions, MLPs or blocks that turn the residual stream least."""

    unit: Unit = "sub-block"
    iterative: Annotated[
        bool, limit(description="Measure again after each removal, rather than once.")
    ] = False


@settings
class EvoPressSettings(UnitAmount):
    """Searching by evolution for the set of removals nearest the original in KL."""

    unit: Unit = "sub-block"
    generations: Annotated[
        int | None,
        limit(ge=1, description="Generations; k (n - k) / 1.5 for k of n blocks if not given."),
    ] = None
    initial: Annotated[int, limit(ge=1, description="Random sets to start from.")] = 64
    offspring: Annotated[int, limit(ge=2, description="Changed copies tried per generation.")] = 32
    survivors: Annotated[
        int, limit(ge=1, description="Of these, how many reach the second selection.")
    ] = 2
    first_tokens: Annotated[
        int, limit(ge=1, description="Calibration tokens of the first selection.")
    ] = 2048
    score_tokens: ScoredTokens = 16384
    seed: Seed = 0

    @checked
    def _check_survivors(self) -> Self:
        if self.survivors > self.offspring:
            raise ValueError("`survivors` cannot be more than `offspring`")
        return self


@settings
class GateSettings(UnitAmount):
    """Dropping what gates, trained with frozen weights, learn to close first."""

    steps: Annotated[int, limit(ge=1, description="Steps of 8 sequences that gates train.")] = 150
    rate: Annotated[float, limit(gt=0, le=1, description="Learning rate of the gates.")] = 0.1
    seed: Seed = 0


@settings
class TaylorSettings(UnitAmount):
    """Dropping what has the least first-order effect on the loss. Needs gradients."""

    score_tokens: ScoredTokens = 16384


@settings
class MagnitudeSettings(UnitAmount):
    """Dropping what has the smallest weights, a baseline. Needs no data."""


@settings
class RandomSettings(UnitAmount):
    """Dropping at random, the baseline that a method has to beat. Needs no data."""

    seed: Seed = 0
