"""Every stage and every method it can use, in one table. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from compresso.compensate_settings import (
    EoraSettings,
    LoftqSettings,
    LqLoraSettings,
    LrecSettings,
    RilqSettings,
)
from compresso.depth_settings import (
    BlockPrunerSettings,
    ContiguousSettings,
    EvoPressSettings,
    GateSettings,
    LlmDropSettings,
    MagnitudeSettings,
    ManualSettings,
    RandomSettings,
    ShortGptSettings,
    TailSettings,
    TaylorSettings,
)
from compresso.fold_settings import FoldGptSettings, RecursiveSettings
from compresso.heal_settings import (
    FullSettings,
    LastSettings,
    LisaSettings,
    LoraSettings,
    NeighboursSettings,
    NormsSettings,
    QloraSettings,
)
from compresso.quantize_settings import (
    AutoRoundSettings,
    DecompositionSettings,
    GptqHiggsSettings,
    GptqSettings,
    HiggsSettings,
    HqqSettings,
    Int8Settings,
    Nf4Settings,
    RsqSettings,
    RtnSettings,
)
from compresso.settings import AnalyzeSettings, EvalSettings


@dataclass(frozen=True)
class Method:
    """One way to do a stage.

    settings:   its record.
    code:       "module:function" of its formula, or of what applies that.
    follows:    paper or specification.
    calibrated: whether it reads calibration text.
    packed_as:  the layout of the linears it quantizes, if it does.
    """

    settings: type
    code: str
    follows: str
    calibrated: bool
    packed_as: Literal["compressed-tensors", "coded", "bitsandbytes"] = "compressed-tensors"


@dataclass(frozen=True)
class Stage:
    """One thing that can be done to a checkpoint.

    code:   "module:function".
    takes:  the kind of weights it reads. leaves: the kind it writes (`same`: what it read),
            or None if it writes none.
    methods: the first is the default.
    copies:  whether it copies stored tensors, so that an adapter beside them would be lost.
    presets: name -> method and settings.
    """

    code: str
    takes: Literal["dense", "any"]
    leaves: Literal["dense", "quantized", "same"] | None
    methods: dict[str, Method]
    presets: dict[str, dict[str, Any]] = field(default_factory=dict)
    copies: bool = False


STAGES = {
    "analyze": Stage(
        "compresso.stages.analyze:analyze",
        takes="any",
        leaves=None,
        methods={
            "similarity": Method(
                AnalyzeSettings,
                "compresso.kernels.similarity:angular_distance",
                "arXiv:2403.03853, arXiv:2403.17887, arXiv:2406.15786",
                calibrated=True,
            ),
        },
    ),
    "prune": Stage(
        "compresso.stages.prune:prune",
        takes="dense",
        leaves="dense",
        copies=True,
        methods={
            "shortgpt": Method(
                ShortGptSettings,
                "compresso.stages.prune_choice:shortgpt",
                "arXiv:2403.03853",
                calibrated=True,
            ),
            "contiguous": Method(
                ContiguousSettings,
                "compresso.stages.prune_choice:contiguous",
                "arXiv:2403.17887",
                calibrated=True,
            ),
            "blockpruner": Method(
                BlockPrunerSettings,
                "compresso.stages.prune_search:blockpruner",
                "arXiv:2406.10594",
                calibrated=True,
            ),
            "evopress": Method(
                EvoPressSettings,
                "compresso.stages.prune_search:evopress",
                "arXiv:2410.14649",
                calibrated=True,
            ),
            "llm-drop": Method(
                LlmDropSettings,
                "compresso.stages.prune_search:llm_drop",
                "arXiv:2406.15786",
                calibrated=True,
            ),
            "foldgpt": Method(
                GateSettings,
                "compresso.stages.prune_learned:foldgpt",
                "arXiv:2407.00928 in compresso's own design",
                calibrated=True,
            ),
            "taylor": Method(
                TaylorSettings,
                "compresso.stages.prune_learned:taylor",
                "arXiv:2305.11627",
                calibrated=True,
            ),
            "magnitude": Method(
                MagnitudeSettings,
                "compresso.stages.prune_learned:magnitude",
                "a baseline",
                calibrated=False,
            ),
            "random": Method(
                RandomSettings,
                "compresso.stages.prune_choice:at_random",
                "a baseline",
                calibrated=False,
            ),
            "tail": Method(
                TailSettings,
                "compresso.stages.prune_choice:deepest",
                "arXiv:2403.17887, simple variant",
                calibrated=False,
            ),
            "manual": Method(
                ManualSettings,
                "compresso.stages.prune_choice:manual",
                "the user's choice",
                calibrated=False,
            ),
        },
    ),
    "fold": Stage(
        "compresso.stages.fold:fold",
        takes="dense",
        leaves="dense",
        copies=True,
        methods={
            "foldgpt": Method(
                FoldGptSettings,
                "compresso.stages.fold_plan:grouped",
                "arXiv:2407.00928, groups by measured damage",
                calibrated=True,
            ),
            "recursive": Method(
                RecursiveSettings,
                "compresso.stages.fold_plan:looped",
                "arXiv:2410.20672",
                calibrated=True,
            ),
        },
    ),
    "quantize": Stage(
        "compresso.stages.quantize:quantize",
        takes="dense",
        leaves="quantized",
        methods={
            "gptq": Method(
                GptqSettings,
                "compresso.kernels.gptq:quantize",
                "arXiv:2210.17323",
                calibrated=True,
            ),
            "rtn": Method(
                RtnSettings,
                "compresso.kernels.grid:quantize",
                "nearest level",
                calibrated=False,
            ),
            "rsq": Method(
                RsqSettings,
                "compresso.kernels.gptq:quantize",
                "arXiv:2503.01820",
                calibrated=True,
            ),
            "autoround": Method(
                AutoRoundSettings,
                "compresso.calibration.tuning:tune_block",
                "arXiv:2309.05516",
                calibrated=True,
            ),
            "higgs": Method(
                HiggsSettings,
                "compresso.kernels.higgs:quantize",
                "arXiv:2411.17525",
                calibrated=False,
                packed_as="coded",
            ),
            "gptq+higgs": Method(
                GptqHiggsSettings,
                "compresso.kernels.higgs:quantize_with_feedback",
                "arXiv:2411.17525 with arXiv:2210.17323",
                calibrated=True,
                packed_as="coded",
            ),
            "hqq": Method(
                HqqSettings,
                "compresso.kernels.hqq:quantize",
                "Badri and Shaji, 2023",
                calibrated=False,
                packed_as="coded",
            ),
            "lq-lora": Method(
                DecompositionSettings,
                "compresso.kernels.decomposition:quantize",
                "arXiv:2311.12023",
                calibrated=True,
            ),
            "nf4": Method(
                Nf4Settings,
                "compresso.kernels.normal_float:quantize",
                "arXiv:2305.14314",
                calibrated=False,
                packed_as="bitsandbytes",
            ),
            "int8": Method(
                Int8Settings,
                "compresso.kernels.normal_float:quantize_rows",
                "arXiv:2208.07339",
                calibrated=False,
                packed_as="bitsandbytes",
            ),
        },
        presets={
            "fast": {"method": "rtn"},
            "default": {"method": "gptq"},
            "best": {"method": "gptq", "match": 0.5},
        },
    ),
    "compensate": Stage(
        "compresso.stages.compensate:compensate",
        takes="any",
        leaves="same",
        methods={
            "eora": Method(
                EoraSettings,
                "compresso.kernels.lowrank:truncate",
                "arXiv:2410.21271",
                calibrated=True,
            ),
            "lq-lora": Method(
                LqLoraSettings,
                "compresso.kernels.decomposition:decompose",
                "arXiv:2311.12023",
                calibrated=True,
            ),
            "loftq": Method(
                LoftqSettings,
                "compresso.kernels.decomposition:decompose",
                "arXiv:2310.08659",
                calibrated=False,
            ),
            "rilq": Method(
                RilqSettings,
                "compresso.stages.compensate_trained:rilq",
                "arXiv:2412.01129",
                calibrated=True,
            ),
            "lrec": Method(
                LrecSettings,
                "compresso.stages.compensate_trained:rilq",
                "arXiv:2306.08162",
                calibrated=True,
            ),
        },
    ),
    "heal": Stage(
        "compresso.stages.heal:heal",
        takes="any",
        leaves="same",
        methods={
            "lora": Method(
                LoraSettings,
                "compresso.stages.heal:heal",
                "arXiv:2106.09685",
                calibrated=True,
            ),
            "qlora": Method(
                QloraSettings,
                "compresso.stages.heal:heal",
                "arXiv:2305.14314",
                calibrated=True,
            ),
            "full": Method(
                FullSettings,
                "compresso.stages.heal:heal",
                "all weights",
                calibrated=True,
            ),
            "last-k": Method(
                LastSettings,
                "compresso.stages.heal:heal",
                "arXiv:2411.15558",
                calibrated=True,
            ),
            "lisa": Method(
                LisaSettings,
                "compresso.stages.heal:heal",
                "arXiv:2403.17919",
                calibrated=True,
            ),
            "norms": Method(
                NormsSettings,
                "compresso.stages.heal:heal",
                "arXiv:2312.15230",
                calibrated=True,
            ),
            "neighbours": Method(
                NeighboursSettings,
                "compresso.stages.heal:heal",
                "compresso's own",
                calibrated=True,
            ),
        },
    ),
    "eval": Stage(
        "compresso.stages.evaluate:evaluate",
        takes="any",
        leaves=None,
        methods={
            "standard": Method(
                EvalSettings,
                "compresso.kernels.divergence:token_scores",
                "arXiv:2210.17323 (perplexity), llama.cpp (KL, same top token)",
                calibrated=False,
            ),
        },
    ),
}
