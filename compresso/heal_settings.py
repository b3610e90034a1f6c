"""The settings of the methods that heal a model by training. Imports no torch."""

from __future__ import annotations

from typing import Annotated

from compresso.config import limit, settings


@settings
class HealSettings:
    """Training after compression."""

    original: Annotated[
        str | None,
        limit(description="The model to learn from; else the recorded ancestor."),
    ] = None
    seed: Annotated[int, limit(ge=0, description="Seed of every random choice.")] = 0


@settings
class LoraSettings(HealSettings):
    """Training a low-rank correction of every linear."""


@settings
class QloraSettings(LoraSettings):
    """The same beside weights that stay codes in memory."""


@settings
class FullSettings(HealSettings):
    """Training all weights."""


@settings
class LastSettings(HealSettings):
    """Training the last blocks, the final norm and the head."""


@settings
class LisaSettings(HealSettings):
    """Training a few blocks at a time, drawn anew every few steps, embeddings and head always."""


@settings
class NormsSettings(HealSettings):
    """Training norms and biases alone."""


@settings
class NeighboursSettings(HealSettings):
    """Training the blocks beside removed ones."""
