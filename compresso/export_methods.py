"""The formats that models are exported to, in one table. Imports no torch."""

from __future__ import annotations

from compresso.export_settings import CompressedTensorsSettings, DenseSettings
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
        "dense": Method(
            DenseSettings,
            "compresso.formats.dense:write",
            "Hugging Face safetensors",
            calibrated=False,
        ),
    },
)
