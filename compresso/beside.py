"""What goes beside the weights of a checkpoint: files of the source, code, an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresso.checkpoint.adapter_folder import write_adapter
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.models.names import linear_modules
from compresso.models.structure import MODELING_FILES, needs_code
from compresso.runtime import Runtime

ROWS = "compresso-report.csv"


def side_files(source: Checkpoint, config: dict[str, Any]) -> dict[str, Path]:
    """Name -> file, of all that goes beside a checkpoint with that config.json.

    The code of restructured models is always this version's: an older one is not carried.
    """
    carried = source.side_files()
    own = {file.name: file for file in MODELING_FILES}
    for name in (ROWS, *own):
        carried.pop(name, None)
    if needs_code(config):
        carried |= own
    return carried


def put_adapter(
    written: Checkpoint, factors: Mapping[str, LowRank], target: Path, runtime: Runtime
) -> str | None:
    """Put corrections beside a checkpoint, and say what their key is.

    factors: by the linear's path in the checkpoint, exact in its type. target: where it will be.

    Returns None if there are none. Raises as `write_adapter`.
    """
    adapter = ModelAdapter.open(
        written,
        dtype=written.dtype,
        device=runtime.device,
        trust_remote_code=runtime.trust_remote_code,
    )
    write_adapter(
        written.path,
        factors,
        modules=linear_modules(adapter.model, adapter.family, written),
        base=target,
        dtype=written.dtype,
        fan_in_fan_out=adapter.family.transposed and not written.packed,
    )
    found = Checkpoint(written.path).adapter
    return found.key if found else None
