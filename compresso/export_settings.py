"""The settings of the formats that models are exported to. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from compresso.config import checked, limit, settings

Structure = Annotated[
    Literal["stock", "own"],
    limit(
        description="Of a model with shared or missing parts: the stock architecture, with copies"
        " of shared weights and zeros for what is missing; or compresso's own, with its code."
    ),
]

GgufType = Literal[
    "auto",
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q4_0",
    "q4_1",
    "q5_0",
    "q5_1",
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
    "tq1_0",
    "tq2_0",
    "iq1_s",
    "iq1_m",
    "iq2_xxs",
    "iq2_xs",
    "iq2_s",
    "iq2_m",
    "iq3_xxs",
    "iq3_xs",
    "iq3_s",
    "iq3_m",
    "iq4_nl",
    "iq4_xs",
]
NEED_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs")


@settings
class ExportSettings:
    """What all formats have in common."""

    merge_adapter: Annotated[
        bool,
        limit(description="Add the corrections of an adapter to the weights, if that is exact."),
    ] = False


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


RoundBits = Annotated[
    Bits | None,
    limit(
        description="Round linears to so many bits, by nearest levels, that have no codes that"
        " the format can hold; without it, they are stored dense."
    ),
]
HeadBits = Annotated[
    Bits | None, limit(description="The same for the output head, if it has its own weights.")
]
Uniform = Annotated[
    bool,
    limit(
        description="Store all codes in the one form that holds them all: as wide as the"
        " widest, in the smallest groups. Needed for asymmetric codes of several widths."
    ),
]


@settings
class RoundingSettings(ExportSettings):
    """What is rounded to codes now, as the source has no codes that can be repacked."""

    bits: RoundBits = None
    lm_head_bits: HeadBits = None
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
    uniform: Uniform = False


@settings
class DecilmSettings(ExportSettings):
    """Blocks without attention or MLP as Nemotron-NAS has them, for transformers and vLLM."""

    pack: Annotated[
        bool,
        limit(
            description="Keep codes, as compressed-tensors packs them; otherwise all weights are"
            " dense."
        ),
    ] = True
    uniform: Uniform = False


@settings
class CodesSettings(ExportSettings):
    """What is rounded to codes now, for formats that hold no embedding of codes."""

    structure: Structure = "stock"
    bits: RoundBits = None
    group_size: GroupSize = 64
    symmetric: Symmetric = True


@settings
class GptqExportSettings(CodesSettings):
    """Codes as GPTQ packs them, all in one form; for transformers with gptqmodel, and vLLM."""

    uniform: Uniform = False


@settings
class AutoRoundExportSettings(CodesSettings):
    """The same in auto-round's form: any bits, groups and zeros for every linear, and the head."""

    lm_head_bits: HeadBits = None


@settings
class BitsAndBytesSettings(ExportSettings):
    """4-bit floats or 8-bit integers as bitsandbytes has them; for transformers with it."""

    kind: Annotated[
        Literal["nf4", "fp4", "int8"],
        limit(description="4-bit floats of normal quantiles or with an exponent, or integers."),
    ] = "nf4"
    group_size: Annotated[
        Literal[64, 128, 256, 512, 1024, 2048, 4096],
        limit(description="Of the 4-bit floats: weights sharing a scale."),
    ] = 64
    double: Annotated[bool, limit(description="Of the 4-bit floats: quantize the scales, too.")] = (
        False
    )
    requantize: Annotated[
        bool,
        limit(description="Also round weights that are codes of another kind, a second time."),
    ] = False
    structure: Structure = "stock"


@settings
class DenseSettings(ExportSettings):
    """Plain Hugging Face weights, which stock transformers loads with nothing else installed."""

    structure: Structure = "stock"


@settings
class GgufSettings(ExportSettings):
    """One GGUF file, for llama.cpp and what is built on it."""

    type: Annotated[
        GgufType,
        limit(
            description="`auto` rounds nothing but scales of float32, to float16: codes stay what"
            " they are where GGUF has a layout for them, other weights dense. Any other is"
            " llama.cpp's own mix of that name, which rounds what is not that already."
        ),
    ] = "auto"
    outer: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0"] | None,
        limit(description="Type of the embedding and the head; as `type` says if not given."),
    ] = None
    importance: Annotated[
        bool | None,
        limit(
            description="Weigh errors by the mean squares of the inputs, taken of calibration text"
            " (llama.cpp's imatrix). If not given, for the `iq` types, which need it."
        ),
    ] = None
    tokenizer: Annotated[
        bool, limit(description="Put the tokenizer in; without, the file takes token ids alone.")
    ] = True
    pre_tokenizer: Annotated[
        str | None,
        limit(description="llama.cpp's name of how text is split; found out if not given."),
    ] = None

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.type.startswith("iq") if self.importance is None else self.importance

    @checked
    def _check_importance(self) -> GgufSettings:
        if self.importance and self.type in ("auto", "f32", "f16", "bf16"):
            raise ValueError(f"`importance` would do nothing: `{self.type}` rounds no codes")
        if self.importance is False and self.type in NEED_IMPORTANCE:
            raise ValueError(f"llama.cpp does not make `{self.type}` without `importance`")
        return self
