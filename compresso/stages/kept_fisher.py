"""A Fisher matrix that a run measures once, however often it is stopped."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compresso.checkpoint.kept import KeptState
from compresso.kernels.decomposition import Fisher

NAME, ROWS, COLUMNS = "fisher", ".rows", ".columns"


def fisher_of_run(
    store: KeptState, device: torch.device, measure: Callable[[], dict[str, Fisher]]
) -> dict[str, Fisher]:
    """What an earlier try of this run measured; else what `measure` finds, which is kept.

    store:  of the run. device: where the matrices are to be.

    Keyed as `measure` keys them. Raises as that and `KeptState` do.
    """
    if (kept := store.kept(NAME)) is not None:
        tensors = {name: tensor.to(device) for name, tensor in kept[0].items()}
        names = [name.removesuffix(ROWS) for name in tensors if name.endswith(ROWS)]
        return {
            name: Fisher(tensors[f"{name}{ROWS}"], tensors[f"{name}{COLUMNS}"]) for name in names
        }
    found = measure()
    rows = {f"{name}{ROWS}": one.rows for name, one in found.items()}
    columns = {f"{name}{COLUMNS}": one.columns for name, one in found.items()}
    store.keep(NAME, rows | columns, {})
    return found
