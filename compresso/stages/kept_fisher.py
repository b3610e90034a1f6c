"""A Fisher matrix that a run measures once, however often it is stopped."""

from __future__ import annotations

from torch import Tensor

from compresso.calibration.fisher import measure_fisher
from compresso.checkpoint.kept import KeptState
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import WORK, CheckpointWriter
from compresso.kernels.decomposition import Fisher
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime

NAME, ROWS, COLUMNS = "fisher", ".rows", ".columns"


def fisher_of_run(
    adapter: ModelAdapter,
    source: Checkpoint,
    batches: list[Tensor],
    *,
    target: CheckpointWriter,
    runtime: Runtime,
) -> dict[str, Fisher]:
    """What an earlier try of this run measured; else what `measure_fisher` finds, which is kept.

    target: what the run writes. Otherwise as `measure_fisher`.

    Raises as that and `KeptState` do.
    """
    store = KeptState(target.partial / WORK)
    if (kept := store.kept(NAME)) is not None:
        tensors = {name: tensor.to(adapter.device) for name, tensor in kept[0].items()}
        names = [name.removesuffix(ROWS) for name in tensors if name.endswith(ROWS)]
        return {
            name: Fisher(tensors[f"{name}{ROWS}"], tensors[f"{name}{COLUMNS}"]) for name in names
        }
    found = measure_fisher(adapter, source, batches, runtime=runtime, spill_dir=target.partial)
    rows = {f"{name}{ROWS}": one.rows for name, one in found.items()}
    columns = {f"{name}{COLUMNS}": one.columns for name, one in found.items()}
    store.keep(NAME, rows | columns, {})
    return found
