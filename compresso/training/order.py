"""Which sequences every step of training reads: decided by the seed alone, for any step."""

from __future__ import annotations

import torch

LARGE_PRIME = 1_000_003


def rows_of_step(step: int, *, sequences: int, available: int, seed: int) -> list[int]:
    """The sequences that a step reads, from 0; all come once, in random order, before any again.

    step: from 0. sequences: how many a step reads. available: how many there are.
    """
    start = step * sequences
    rows: list[int] = []
    order: list[int] = []
    held = -1
    for place in range(start, start + sequences):
        epoch, within = divmod(place, available)
        if epoch != held:
            generator = torch.Generator().manual_seed(seed * LARGE_PRIME + epoch)
            order = torch.randperm(available, generator=generator).tolist()
            held = epoch
        rows.append(order[within])
    return rows
