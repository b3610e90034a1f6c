"""The settings of the methods that quantize. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from compresso.config import checked, limit, settings

Bits = Annotated[Literal[2, 3, 4, 8], limit(description="Bits per code.")]
GroupSize = Annotated[
    int,
    limit(ge=-1, description="Columns sharing one scale; a multiple of 8, or -1 for the row."),
]
Symmetric = Annotated[
    bool, limit(description="Levels on both sides of zero, with no stored zero point.")
]
Ignore = Annotated[
    tuple[str, ...],
    limit(description="Linears to keep as they are: names, or `re:` and a pattern."),
]
Search = Annotated[
    Literal["mse", "minmax"],
    limit(description="Fit scales by search for the least error, or to the extremes."),
]
Head = Annotated[bool, limit(description="Quantize the output head too.")]
Pack = Annotated[
    bool, limit(description="Store packed codes; otherwise the rounded weights, uncompressed.")
]


@settings
class LinearChoice:
    """Which linears are quantized, and whether they are stored packed."""

    ignore: Ignore = ()
    lm_head: Head = False
    pack: Pack = True


@settings
class UniformSettings(LinearChoice):
    """A uniform grid for every group of weights."""

    bits: Bits = 4
    group_size: GroupSize = 64
    symmetric: Symmetric = True
    grid: Search = "mse"

    @checked
    def _check_group_size(self) -> Self:
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise ValueError(f"`group_size` must be -1 or a multiple of 8, not {self.group_size}")
        return self


@settings
class RtnSettings(UniformSettings):
    """Rounding every weight to its nearest level. Needs no data."""


@settings
class GptqSettings(UniformSettings):
    """Rounding columns one after another, each one's error moved to those after it."""

    damping: Annotated[
        float,
        limit(gt=0, le=1, description="Fraction of the gram diagonal's mean added to it."),
    ] = 0.01
    act_order: Annotated[
        bool, limit(description="Round the columns of largest input first; groups stay in place.")
    ] = True
    refine: Annotated[
        int,
        limit(ge=0, le=100, description="Passes over codes and scales afterwards; 0: plain GPTQ."),
    ] = 3
