"""The same codes on another uniform grid: more bits, smaller groups, zeros of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from compresso.kernels.grid import Grid, Packed


def recast(
    packed: Packed, *, bits: int, group_size: int, symmetric: bool, dtype: torch.dtype
) -> Packed:
    """What decodes to the same weights on another grid, but for scales that `dtype` rounds.

    packed:     Not modified.
    bits:       at least as many as it has.
    group_size: columns sharing a scale; divides those that it has. -1 for the whole row.
    symmetric:  all zeros are to be 2**(bits - 1). Those of `packed` must all be in the middle, too.
    dtype:      type of the scales.

    Raises ValueError if no such codes decode to the same.
    """
    grid = packed.grid
    if bits < grid.bits:
        raise ValueError(f"{grid.bits} bits do not fit in {bits}")
    codes, zero = packed.codes, grid.zero
    if symmetric:
        middle = 2 ** (grid.bits - 1)
        if not bool((zero == middle).all()):
            raise ValueError("zeros that are not in the middle have no symmetric form")
        shift = 2 ** (bits - 1) - middle
        codes, zero = codes + shift, zero + shift
    scale = _repeated(grid.scale, packed.codes.shape[1], group_size)
    zero = _repeated(zero, packed.codes.shape[1], group_size)
    return Packed(codes, Grid(scale.to(dtype).float(), zero, bits, dtype))


def exact_in(packed: Packed, dtype: torch.dtype) -> bool:
    """Whether scales can be stored in `dtype` as they are."""
    return torch.equal(packed.grid.scale.to(dtype).float(), packed.grid.scale.float())


def _repeated(values: Tensor, columns: int, group_size: int) -> Tensor:
    """Values of groups, (rows, groups), for smaller groups."""
    size = columns if group_size == -1 else group_size
    width = columns // values.shape[1]
    if columns % size or width % size:
        raise ValueError(f"groups of {width} columns do not divide into groups of {size}")
    return values.repeat_interleave(width // size, 1).contiguous()
