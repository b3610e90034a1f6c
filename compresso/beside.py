"""What goes beside the weights of a checkpoint: files of the source, code, an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compresso.card import CARD
from compresso.checkpoint.adapter_folder import write_adapter
from compresso.checkpoint.directory import ADAPTER
from compresso.checkpoint.layout import METHOD
from compresso.checkpoint.packings import method_of
from compresso.checkpoint.reader import Checkpoint
from compresso.models.adapter import ModelAdapter
from compresso.models.names import linear_modules
from compresso.models.structure import DECILM_FILE, MODELING_FILES, needs_code
from compresso.publishing import original_card
from compresso.report import TRAINING_PICTURE, TRAINING_TABLE, Report
from compresso.runtime import Runtime

ROWS = "compresso-report.csv"
ENTRY = "quantization_config"


def side_files(source: Checkpoint, config: dict[str, Any]) -> dict[str, Path]:
    """Name -> file, of all that goes beside a checkpoint with that config.json.

    The code of restructured models is always this version's: an older one is not carried.
    """
    carried = source.side_files()
    own = {file.name: file for file in MODELING_FILES}
    for name in (ROWS, TRAINING_TABLE, TRAINING_PICTURE, CARD, DECILM_FILE.name, *own):
        carried.pop(name, None)
    carried |= original_card(source)
    if needs_code(config):
        carried |= own
    return carried


def put_adapter(
    written: Checkpoint, report: Report, target: Path, runtime: Runtime
) -> dict[str, str]:
    """Put a report's corrections beside the checkpoint that it is of.

    target: where the checkpoint will be.

    Returns what its record has to say of them, nothing if there are none. Raises as
    `write_adapter`.
    """
    if not report.adapter:
        return {}
    adapter = ModelAdapter.open(
        written,
        dtype=written.dtype,
        device=runtime.device,
        trust_remote_code=runtime.trust_remote_code,
    )
    write_adapter(
        written.path,
        report.adapter,
        modules=linear_modules(adapter.model, adapter.family, written),
        base=target,
        dtype=written.dtype,
        fan_in_fan_out=adapter.family.transposed and not written.packed,
    )
    found = Checkpoint(written.path).adapter
    if found is None:
        return {}
    if method_of(written.config) == METHOD and not written.config[ENTRY].get("dequantize"):
        report.warnings.append(
            "PEFT can put the adapter on only after the loaded model has run once, on any token:"
            " with codes of several widths, its weights come with the first forward pass"
        )
    return {ADAPTER: found.key}
