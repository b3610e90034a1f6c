"""The settings of the methods that quantize. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from compresso.compensate_settings import DEFAULT_MATCH, DEFAULT_RANK, ByFisher, Rank, Turns
from compresso.config import checked, limit, settings
from compresso.target_settings import Amount, Target

DEFAULT_BITS = 4
POINT_BITS = 8  # of the largest vector grid's codes

Bits = Annotated[
    Literal[2, 3, 4, 8] | None,
    limit(description=f"Bits per code; {DEFAULT_BITS} where neither this nor a target is given."),
]
GroupSize = Annotated[
    int,
    limit(ge=-1, description="Columns sharing one scale; a multiple of 8, or -1 for the row."),
]
ScaleBits = Annotated[
    Literal[8, 16],
    limit(
        description="Bits of a scale: 8 are parts of one scale per row, stored in compresso's own"
        " layout. Those of `nf4` are float32, or 8 in its own form."
    ),
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
ForRuntime = Annotated[
    Literal["vllm", "transformers", "llama.cpp", "peft"] | None,
    limit(
        description="Keep to bits, groups and symmetry that this runtime runs fast, and choose"
        " groups for it. `compresso list runtimes` says what loads where."
    ),
]
Rotate = Annotated[
    bool,
    limit(
        description="Rotate the residual stream and value heads first, which evens out outliers and"
        " changes nothing else; a tied head becomes a matrix of its own."
    ),
]
Damping = Annotated[
    float, limit(gt=0, le=1, description="Fraction of the gram diagonal's mean added to it.")
]
ActOrder = Annotated[
    bool, limit(description="Round the columns of largest input first; groups stay in place.")
]
Refine = Annotated[
    int,
    limit(ge=0, le=100, description="Passes over codes and scales afterwards; 0: plain GPTQ."),
]
Match = Annotated[
    float,
    limit(
        ge=0,
        le=1,
        description="Move weights first, by this much of what would best make up for the error of"
        " the blocks before; 0: not at all.",
    ),
]
MatchShare = Annotated[
    float,
    limit(gt=0, le=1, description="Share of the calibration sequences that `match` compares on."),
]
Seed = Annotated[int, limit(ge=0, description="Seed of every random choice.")]


@settings
class LinearChoice:
    """Which linears are quantized, in which coordinates, and whether they are stored packed."""

    ignore: Ignore = ()
    lm_head: Head = False
    pack: Pack = True
    rotate: Rotate = False
    seed: Seed = 0
    for_runtime: ForRuntime = None


@settings
class GroupedSettings(LinearChoice):
    """Scales for groups of weights."""

    bits: Bits = None
    group_size: GroupSize = 64
    scale_bits: ScaleBits = 16

    @checked
    def _check_group_size(self) -> Self:
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise ValueError(f"`group_size` must be -1 or a multiple of 8, not {self.group_size}")
        return self


@settings
class UniformSettings(GroupedSettings):
    """A uniform grid for every group of weights."""

    symmetric: Symmetric = True
    grid: Search = "mse"


@settings
class RtnSettings(UniformSettings, Target):
    """Rounding every weight to its nearest level. Needs no data."""


@settings
class FeedbackSettings:
    """Errors of rounding moved to weights that are rounded later."""

    damping: Damping = 0.01
    act_order: ActOrder = True
    refine: Refine = 3
    match: Match = DEFAULT_MATCH
    match_share: MatchShare = 0.5

    @property
    def matched(self) -> float:
        """How much of what blocks before lost is made up for."""
        return self.match


@settings
class GptqSettings(FeedbackSettings, UniformSettings, Target):
    """Rounding columns one after another, each one's error moved to those after it."""


@settings
class RsqSettings(FeedbackSettings, UniformSettings):
    """GPTQ of the rotated model, where tokens that get more attention count for more."""

    rotate: Rotate = True
    least: Annotated[
        float,
        limit(
            gt=0,
            le=1,
            description="Weight of the token of a sequence that gets least attention; 1 for"
            " all alike.",
        ),
    ] = 0.005


@settings
class VectorSettings(LinearChoice, Target):
    """A vector grid for weights in rotated blocks."""

    bits: Annotated[
        Literal[2, 3, 4, 8] | None,
        limit(description=f"Bits per weight, scales apart; {DEFAULT_BITS} if not given."),
    ] = None
    dimension: Annotated[
        Literal[1, 2, 4] | None,
        limit(
            description="Weights rounded together, to a grid of at most 256 points; if not given,"
            " 4 at 2 bits, 2 at 3 and 4, and 1 at 8."
        ),
    ] = None
    block: Annotated[
        int,
        limit(
            ge=8,
            description="Columns rotated together and sharing a scale: a power of two, or the"
            " largest one below that divides the columns.",
        ),
    ] = 1024
    scale_bits: ScaleBits = 16

    @checked
    def _check_grid(self) -> Self:
        if self.block & (self.block - 1):
            raise ValueError(f"`block` must be a power of two, not {self.block}")
        if self.hits_target or self.dimension is None:
            return self
        bits = DEFAULT_BITS if self.bits is None else self.bits
        if bits * self.dimension > POINT_BITS:
            raise ValueError(
                f"{bits} bits in {self.dimension} dimensions are 2**{bits * self.dimension} points;"
                f" grids have at most 2**{POINT_BITS}"
            )
        return self


@settings
class HiggsSettings(VectorSettings):
    """Rounding rotated weights to the points of a vector grid. Needs no data."""

    fit: Annotated[
        Literal["rms", "mse"],
        limit(description="Scale to unit variance, or search for the scale of least error."),
    ] = "rms"


@settings
class GptqHiggsSettings(FeedbackSettings, VectorSettings):
    """GPTQ with a vector grid, on rotated weights."""


@settings
class HqqSettings(GroupedSettings):
    """Zeros of groups moved until most errors are small, whatever a few become. Needs no data."""


@settings
class AutoRoundSettings(UniformSettings):
    """Training the rounding of every block by the sign of its gradient."""

    start: Annotated[
        Literal["gptq", "rtn"],
        limit(description="What training starts from; as in the paper: rtn."),
    ] = "gptq"
    match: Annotated[
        float | None,
        limit(
            ge=0,
            le=1,
            description="Move weights first, as `gptq` does, where training starts from that;"
            f" {DEFAULT_MATCH} if not given.",
        ),
    ] = None
    steps: Annotated[int, limit(ge=1, description="Steps of training for every block.")] = 200
    sequences: Annotated[int, limit(ge=1, description="Sequences per step.")] = 8

    @checked
    def _check_match(self) -> Self:
        if self.match and self.start != "gptq":
            raise ValueError(f"`match` needs `start` `gptq`, not `{self.start}`")
        return self

    @property
    def matched(self) -> float:
        """How much of what blocks before lost is made up for before training."""
        if self.match is None:
            return DEFAULT_MATCH if self.start == "gptq" else 0.0
        return self.match


@settings
class DecompositionSettings(UniformSettings, Amount):
    """Rounded codes and a correction of low rank beside them, found in turns."""

    rank: Rank = DEFAULT_RANK
    turns: Turns = 20
    fisher: ByFisher = True

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.fisher


@settings
class Nf4Settings(LinearChoice):
    """4-bit floats in bitsandbytes' format. Needs no data."""

    group_size: Annotated[
        Literal[64, 128, 256, 512, 1024, 2048, 4096],
        limit(description="Weights sharing one scale."),
    ] = 64
    scale_bits: Annotated[
        Literal[8] | None, limit(description="Bits of a scale: 8 is double quantization.")
    ] = None


@settings
class Int8Settings(LinearChoice):
    """8-bit integers by row in bitsandbytes' format. Needs no data."""
