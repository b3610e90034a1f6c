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


@settings
class DenseSettings(ExportSettings):
    """Plain Hugging Face weights, which stock transformers loads with nothing else installed."""

    structure: Structure = "stock"
