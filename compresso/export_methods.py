"""The formats that models are exported to, in one table. Imports no torch."""

from __future__ import annotations

from compresso.export_settings import (
    AutoRoundExportSettings,
    BitsAndBytesSettings,
    CompressedTensorsSettings,
    DecilmSettings,
    DenseSettings,
    GgufSettings,
    GptqExportSettings,
)
from compresso.method import Method, Stage

EXPORT = Stage(
    "compresso.stages.export:export",
    takes="any",
    leaves=None,
    exports=True,
    named="format",
    methods={
        "compressed-tensors": Method(
            CompressedTensorsSettings,
            "compresso.formats.compressed_tensors:write",
            "compressed-tensors pack-quantized",
            calibrated=False,
        ),
        "decilm": Method(
            DecilmSettings,
            "compresso.formats.decilm:write",
            "Nemotron-NAS, arXiv:2411.19146",
            calibrated=False,
        ),
        "gptq": Method(
            GptqExportSettings,
            "compresso.formats.gptq:write",
            "AutoGPTQ, versions 1 and 2",
            calibrated=False,
        ),
        "auto-round": Method(
            AutoRoundExportSettings,
            "compresso.formats.auto_round:write",
            "auto-round",
            calibrated=False,
        ),
        "bitsandbytes": Method(
            BitsAndBytesSettings,
            "compresso.formats.bitsandbytes:write",
            "arXiv:2305.14314, arXiv:2208.07339",
            calibrated=False,
        ),
        "dense": Method(
            DenseSettings,
            "compresso.formats.dense:write",
            "Hugging Face safetensors",
            calibrated=False,
        ),
        "gguf": Method(
            GgufSettings,
            "compresso.formats.gguf:write",
            "llama.cpp",
            calibrated=True,
        ),
    },
)
