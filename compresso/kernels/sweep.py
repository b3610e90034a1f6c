"""Rounding columns one after another, with feedback: the loop that GPTQ and descent share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Rows do not depend on each other, so they can be taken in turns to bound memory. A GPU needs more
# work per launch.
CPU_WEIGHTS = 2**22
GPU_WEIGHTS = 2**27


@dataclass(frozen=True)
class Lattice:
    """What the columns of a group may be rounded to: `scale` times a whole number.

    scale, low, high: (1, rows); low and high are the smallest and the largest of these numbers.
    """

    scale: Tensor
    low: Tensor
    high: Tensor


def lattices(scale: Tensor, zero: Tensor, max_code: int) -> list[Lattice]:
    """One for each group; arguments are transposed, (groups, rows)."""
    rows = zip(scale, zero, strict=True)
    return [Lattice(s[None], -z[None], max_code - z[None]) for s, z in rows]


def row_slices(weight: Tensor) -> list[slice]:
    """Slices of the rows of a matrix, each of a size that bounds the memory of working on it."""
    rows, columns = weight.shape
    step = max(1, (CPU_WEIGHTS if weight.device.type == "cpu" else GPU_WEIGHTS) // columns)
    return [slice(start, start + step) for start in range(0, rows, step)]


def round_in_turn(
    target: Tensor, anchor: Tensor, feedback: Tensor, lattice: list[Lattice], *, block: int
) -> Tensor:
    """Round one column after another, each shifted by the changes of those before it.

    target:   (columns, rows): what to round. Overwritten with the changes, which are `anchor`
              less what was rounded to.
    anchor:   (columns, rows): what changes are counted from. Not modified.
    feedback: (columns, columns), zero on and above the diagonal: how much of the change of column
              i is added to column j before it is rounded. Not modified.
    lattice:  that of each column.
    block:    columns between matrix products. Changes the speed, and the result only through the
              order of sums.

    Returns the codes, (columns, rows) uint8. A column is a row here, so that it is contiguous.
    """
    codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
    for number, start in enumerate(range(0, len(target), block), start=1):
        stop = start + block
        here = slice(start, stop)
        codes[here] = _round_block(target[here], anchor[here], feedback[here, here], lattice[here])
        # A binary tree of blocks: when the left half of a node is done, its right half takes in
        # the changes at once. So most of the arithmetic is in few, large and fast products.
        half = block * (number & -number)
        left, right = slice(stop - half, stop), slice(stop, stop + half)
        target[right].addmm_(feedback[right, left], target[left])
    return codes


def _round_block(
    target: Tensor, anchor: Tensor, feedback: Tensor, lattice: list[Lattice]
) -> Tensor:
    """As `round_in_turn`, returning the codes as floats: five small operations a column."""
    levels = torch.empty_like(target)
    columns = zip(
        torch.split(target, 1), torch.split(anchor, 1), torch.split(levels, 1), lattice, strict=True
    )
    for index, (shifted, start, level, grid) in enumerate(columns):
        if index:
            shifted.addmm_(feedback[index : index + 1, :index], target[:index])
        torch.div(shifted, grid.scale, out=level).round_()
        torch.clamp(level, grid.low, grid.high, out=level)
        torch.addcmul(start, level, grid.scale, value=-1, out=shifted)
    return levels.sub_(torch.cat([grid.low for grid in lattice]))
