"""Plain Hugging Face weights: what stock transformers, and nearly everything else, loads."""

from __future__ import annotations

from compresso.formats.parts import corrections, dense_config, write_parts
from compresso.formats.writing import Export, Written


def write(export: Export) -> Written:
    """Every weight as a dense tensor in the model's type, codes decoded.

    Corrections of an adapter lie beside them, or are added and the sum rounded once.
    """
    model = export.stock if export.settings.structure == "stock" else export.own
    adapter = export.open(model)
    parts = write_parts(export, model, adapter, lambda matrix: None)
    return Written(
        exported=model,
        config=dense_config(model),
        expected=parts.expected,
        carried=adapter.unmapped_tensors(),
        rows=parts.rows,
        adapter=corrections(export, model, adapter),
        fan_in_fan_out=adapter.family.transposed,
    )
