"""What the choice of bits for every input group is to hit. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from compresso.config import checked, limit, settings


@settings
class Amount:
    """How large the output is to be, if its bits are chosen for that."""

    target_bits: Annotated[
        float | None,
        limit(gt=0, description="Stored bits per quantized weight, scales and all, on average."),
    ] = None
    size: Annotated[
        str | None, limit(description="Bytes that all of the output stores, such as `40MB`.")
    ] = None

    @checked
    def _check_amount(self) -> Self:
        if self.target_bits is not None and self.size is not None:
            raise ValueError("give only one of `target_bits`, `size`")
        if self.hits_target and getattr(self, "bits", None) is not None:
            raise ValueError("give only one of `bits`, `target_bits`, `size`")
        return self

    @property
    def hits_target(self) -> bool:
        """Whether bits are chosen, not given."""
        return self.target_bits is not None or self.size is not None


@settings
class Target(Amount):
    """A size that the choice of bits for every input group is to hit."""

    allocation: Annotated[
        Literal["search", "dp", "lim", "zd", "uniform"],
        limit(
            description="How a target is hit: by the least sum of what groups lose alone (`dp`), by"
            " a search on measured KL from there, by an order of blocks (`lim`: what they change,"
            " `zd`: large weights), or all alike."
        ),
    ] = "dp"
    predict: Annotated[
        Literal["damage", "noise"],
        limit(description="What a group is taken to lose: measured, or from its answer to noise."),
    ] = "damage"
    sensitivity_tokens: Annotated[
        int, limit(ge=1, description="Tokens that every group is measured on.")
    ] = 4096
    score_tokens: Annotated[
        int, limit(ge=1, description="Tokens that choices for a target are measured on.")
    ] = 8192
    generations: Annotated[int, limit(ge=0, description="Generations of a target's search.")] = 20
    offspring: Annotated[int, limit(ge=1, description="Changed copies tried per generation.")] = 16
    survivors: Annotated[
        int, limit(ge=1, description="Of these, how many reach the second selection.")
    ] = 4
    first_tokens: Annotated[
        int, limit(ge=1, description="Tokens of the first selection of a target's search.")
    ] = 2048

    @checked
    def _check_target(self) -> Self:
        if self.survivors > self.offspring:
            raise ValueError("`survivors` cannot be more than `offspring`")
        return self
