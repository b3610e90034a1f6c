"""The settings of the formats that models are exported to. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from compresso.config import limit, settings

Structure = Annotated[
    Literal["stock", "own"],
    limit(
        description="Of a model with shared or missing parts: the stock architecture, with copies"
        " of shared weights and zeros for what is missing; or compresso's own, with its code."
    ),
]


@settings
class ExportSettings:
    """What all formats have in common."""

    merge_adapter: Annotated[
        bool,
        limit(description="Add the corrections of an adapter to the weights, if that is exact."),
    ] = False
    verify: Annotated[
        bool,
        limit(
            description="Load the result in the runtime it is for, and compare what it says with"
            " MODEL."
        ),
    ] = True


Bits = Literal[2, 3, 4, 8]
GroupSize = Annotated[
    int,
    limit(
        ge=-1, description="For codes found now: columns sharing one scale; -1 for the whole row."
    ),
]
Symmetric = Annotated[
    bool, limit(description="For codes found now: levels on both sides of zero, and no zero point.")
]


@settings
class RoundingSettings(ExportSettings):
    """What is rounded to codes now, as the source has no codes that can be repacked."""

    bits: Annotated[
        Bits | None,
        limit(
            description="Round linears to so many bits, by nearest levels, that have no codes that"
            " the format can hold; without it, they are stored dense."
        ),
    ] = None
    lm_head_bits: Annotated[
        Bits | None, limit(description="The same for the output head, if it has its own weights.")
    ] = None
    group_size: GroupSize = 64
    symmetric: Symmetric = True


@settings
class CompressedTensorsSettings(RoundingSettings):
    """Codes as compressed-tensors packs them, for transformers and vLLM."""

    structure: Structure = "own"
    embedding_bits: Annotated[
        Bits | None,
        limit(description="The same for the embedding, if all codes come in one form."),
    ] = None
    uniform: Annotated[
        bool,
        limit(
            description="Store all codes in the one form that holds them all: as wide as the"
            " widest, in the smallest groups. Needed for asymmetric codes of several widths."
        ),
    ] = False


@settings
class DenseSettings(ExportSettings):
    """Plain Hugging Face weights, which stock transformers loads with nothing else installed."""

    structure: Structure = "stock"
