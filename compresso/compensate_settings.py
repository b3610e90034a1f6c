"""The settings of the methods that compensate errors. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from compresso.config import limit, settings


@settings
class CompensateSettings:
    """A correction of low rank for every linear."""

    original: Annotated[
        str | None,
        limit(description="The model to come near to; else the recorded ancestor."),
    ] = None
    rank: Annotated[int, limit(ge=1, description="Rank of every correction.")] = 16
    merge: Annotated[
        bool | None,
        limit(
            description="Add corrections to the weights; otherwise they become an adapter beside"
            " them. Done where the weights are dense, if not given."
        ),
    ] = None
    seed: Annotated[int, limit(ge=0, description="Seed of every random choice.")] = 0


@settings
class EoraSettings(CompensateSettings):
    """The correction that leaves the least error of every linear's output. No training."""


@settings
class LqLoraSettings(CompensateSettings):
    """Codes and a correction that are found in turns."""


@settings
class LoftqSettings(CompensateSettings):
    """Codes and a correction in turns, of the weights alone: a baseline. Needs no data."""


@settings
class RilqSettings(CompensateSettings):
    """Corrections trained together on what the whole model says."""


@settings
class LrecSettings(RilqSettings):
    """The same, trained on the scores of the next token."""
