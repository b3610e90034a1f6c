"""The settings of the methods that let blocks share weights. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from compresso.config import checked, limit, settings
from compresso.depth_settings import BlockAmount, Protection, Ratio, ScoredTokens, one_of

Rank = Annotated[
    int,
    limit(ge=0, description="Rank of the correction of every linear that is not a block's own."),
]
Weighted = Annotated[
    bool, limit(description="Fit corrections to the outputs on calibration text, not to weights.")
]


@settings
class FoldGptSettings(Protection, BlockAmount):
    """Sharing linears in the groups of adjacent blocks that lose least by it."""

    max_group: Annotated[int, limit(ge=2, description="Most blocks that share one set.")] = 4
    rank: Rank = 0
    weighted: Weighted = True
    score_tokens: ScoredTokens = 16384


@settings
class RecursiveSettings:
    """Looping over a few blocks, each use with low-rank corrections of its own."""

    slots: Annotated[
        int | None, limit(ge=1, description="Blocks that are stored, and used in turn.")
    ] = None
    loops: Annotated[
        int | None, limit(ge=2, description="Times that the stored blocks are run, at most.")
    ] = None
    init: Annotated[
        Literal["stepwise", "stepwise-start", "average", "lower"] | None,
        limit(
            description="What a stored block is made from: one block at even steps, from the first"
            " to the last or from the first on; the mean of all that use it; or one of the first."
            " As in the paper, `average` with corrections and `stepwise` without."
        ),
    ] = None
    ratio: Ratio = None
    rank: Rank = 0
    weighted: Weighted = True

    @checked
    def _check(self) -> Self:
        one_of(slots=self.slots, loops=self.loops)
        if self.ratio is not None and self.rank:
            raise ValueError("give only one of `ratio`, `rank`: the ratio decides the rank")
        return self
