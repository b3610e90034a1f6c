"""Every stage and every method it can use, in one table. Imports no torch."""

from __future__ import annotations

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
from compresso.export_methods import EXPORT
from compresso.fold_settings import FoldGptSettings, RecursiveSettings
from compresso.method import Method, Stage
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
from compresso.repair_methods import COMPENSATE, HEAL
from compresso.settings import AnalyzeSettings, EvalSettings

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
            "best": {"method": "gptq+higgs", "match_share": 1.0},
        },
    ),
    "compensate": COMPENSATE,
    "heal": HEAL,
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
    "export": EXPORT,
}
