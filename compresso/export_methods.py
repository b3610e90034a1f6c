"""The formats that models are exported to, in one table. Imports no torch."""

from __future__ import annotations

from compresso.export_settings import DenseSettings
from compresso.method import Method, Stage

EXPORT = Stage(
    "compresso.stages.export:export",
    takes="any",
    leaves=None,
    exports=True,
    named="format",
    methods={
        "dense": Method(
            DenseSettings,
            "compresso.formats.dense:write",
            "Hugging Face safetensors",
            calibrated=False,
        ),
    },
)
