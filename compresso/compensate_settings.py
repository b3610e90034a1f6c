"""The settings of the methods that compensate errors. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from compresso.config import checked, limit, settings

DEFAULT_RANK = 16
DEFAULT_MATCH = 0.5
ADDED = r"\+\s*\d+(\.\d+)?\s*(%|[KMGTkmgt]?[Ii]?[Bb]?)"

Rank = Annotated[int, limit(ge=1, description="Rank of every correction.")]
ByFisher = Annotated[
    bool, limit(description="Weigh rows and columns by the loss's squared gradients.")
]
Turns = Annotated[
    int, limit(ge=1, description="Most turns of factors and codes; the best one is kept.")
]
Hidden = Annotated[
    float,
    limit(
        ge=0,
        description="What the squared difference of the states that the head reads counts in the"
        " loss.",
    ),
]
Divergence = Annotated[
    float,
    limit(ge=0, description="What the divergence of the original's scores counts in the loss."),
]


@settings
class CompensateSettings:
    """A correction of low rank for every linear."""

    original: Annotated[
        str | None,
        limit(description="The model to come near to; else the recorded ancestor."),
    ] = None


@settings
class SizedSettings(CompensateSettings):
    """Corrections of one rank or of ranks within a size, which can be added to the weights."""

    merge: Annotated[
        bool | None,
        limit(
            description="Add corrections to the weights; otherwise they become an adapter beside"
            " them. Done where the weights are dense, if not given."
        ),
    ] = None
    rank: Annotated[
        int | None,
        limit(
            ge=1,
            description=f"Rank of every correction; {DEFAULT_RANK} if not given, nor a size; `eora`"
            " takes all in a model that was only pruned, where it adds no bytes. An adapter that"
            " training goes on from keeps its own.",
        ),
    ] = None
    size: Annotated[
        str | None,
        limit(
            description="Bytes to add, such as `+2MB`, or `+5%` of what is stored; ranks are"
            " higher where they help more, but alike where blocks share weights or begin as"
            " nothing. Not for what is merged, which takes no bytes."
        ),
    ] = None

    @checked
    def _check_amount(self) -> Self:
        if self.rank is not None and self.size is not None:
            raise ValueError("give only one of `rank`, `size`")
        if self.size is not None and not re.fullmatch(ADDED, self.size.strip()):
            raise ValueError(f"`size` is what to add, such as `+5%` or `+2MB`, not `{self.size}`")
        return self


@settings
class EoraSettings(SizedSettings):
    """The correction that leaves the least error of every linear's output. No training."""

    match: Annotated[
        float | None,
        limit(
            ge=0,
            le=1,
            description="Correct, by this much, what blocks before lost, too; 0: only what every"
            f" linear loses itself. {DEFAULT_MATCH} for weighted corrections, if not given.",
        ),
    ] = None
    weighted: Annotated[
        bool,
        limit(description="Fit corrections to the outputs on calibration text, not to weights."),
    ] = True

    @checked
    def _check(self) -> Self:
        if self.match and not self.weighted:
            raise ValueError("`match` needs `weighted`")
        return self

    @property
    def matched(self) -> float:
        """How much of what blocks before lost is corrected."""
        if self.match is None:
            return DEFAULT_MATCH if self.weighted else 0.0
        return self.match

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.weighted


@settings
class LqLoraSettings(CompensateSettings):
    """Codes and a correction that are found in turns."""

    rank: Rank = DEFAULT_RANK
    turns: Turns = 20
    fisher: ByFisher = True

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.fisher


@settings
class LoftqSettings(CompensateSettings):
    """Codes and a correction in turns, of the weights alone: a baseline. Needs no data."""

    rank: Rank = DEFAULT_RANK
    turns: Turns = 5


@settings
class RilqSettings(SizedSettings):
    """Corrections trained together on what the whole model says beside the original."""

    start: Annotated[
        Literal["auto", "gaussian", "eora", "adapter"],
        limit(
            description="What corrections begin as: nothing, what `eora` finds, or the model's"
            " adapter, whose ranks stay; `auto`: an adapter if there is one, else what `eora` finds"
            " where it can."
        ),
    ] = "auto"
    pooled: Annotated[
        bool,
        limit(
            description="Let corrections see sums over quantization groups, so that they are merged"
            " into zero points: no adapter is left."
        ),
    ] = False
    hidden: Hidden = 1.0
    divergence: Divergence = 1.0
    next_token: Annotated[
        float, limit(ge=0, description="What the error of the next token counts in the loss.")
    ] = 0.0
    steps: Annotated[int, limit(ge=1, description="Steps of the optimizer, at most.")] = 300
    sequences: Annotated[int, limit(ge=1, description="Sequences per step of the optimizer.")] = 8
    rate: Annotated[
        float | None,
        limit(
            gt=0,
            description="Largest learning rate; if not given, 0.001 at a mean rank of 16, half of"
            " that at 64: by the root.",
        ),
    ] = None
    warmup: Annotated[
        float, limit(ge=0, lt=1, description="Share of the steps over which the rate rises.")
    ] = 0.05
    schedule: Annotated[
        Literal["cosine", "constant"], limit(description="What the rate does afterwards.")
    ] = "cosine"
    heldout_share: Annotated[
        float,
        limit(
            gt=0,
            lt=1,
            description="Share of the sequences that is not learnt from; they come from the end of"
            " the text, which the others leave alone.",
        ),
    ] = 0.2
    evaluate_every: Annotated[
        int, limit(ge=1, description="Steps between measurements of those held out.")
    ] = 25
    patience: Annotated[
        int,
        limit(ge=0, description="Measurements without a gain that end training; 0 for never."),
    ] = 5
    teacher: Annotated[
        Literal["auto", "disk", "resident"],
        limit(description="Where the original is: asked once and written to disk, or in memory."),
    ] = "auto"
    checkpointing: Annotated[
        Literal["auto", "on", "off"],
        limit(
            description="Run blocks again on the way back, to save memory; `auto` where memory is"
            " short."
        ),
    ] = "auto"
    plot: Annotated[
        bool | None,
        limit(description="Draw training as a .png; done if matplotlib is installed."),
    ] = None
    seed: Annotated[int, limit(ge=0, description="Seed of every random choice.")] = 0

    @checked
    def _check(self) -> Self:
        if not (self.hidden or self.divergence):
            raise ValueError("`hidden` or `divergence` must count something")
        return self


@settings
class LrecSettings(RilqSettings):
    """The same, trained on the original's scores of the next token alone."""

    hidden: Hidden = 0.0
