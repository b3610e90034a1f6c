"""Coordinate descent on the codes and scales of a quantized matrix."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compresso.kernels.grid import Grid, Packed
from compresso.kernels.scales import storable
from compresso.kernels.sweep import lattices, round_in_turn, row_slices


def descend(
    weight: Tensor, packed: Packed, gram: Tensor, *, damping: float, passes: int, block: int = 32
) -> Packed:
    """Lower tr((W - Q) G (W - Q)^T) by exact steps on one code, or one scale, at a time.

    weight:  W, (rows, columns) float32. Not modified.
    packed:  Q, where to start; its zeros stay as they are. Not modified.
    gram:    G, (columns, columns) float32: the mean of x x^T over tokens. Not modified.
    damping: fraction of the diagonal's mean added to it, over columns with input.
    passes:  times to go through all groups. Each costs twice the arithmetic of GPTQ.
    block:   as in `round_in_turn`.

    In each group of columns, every code in turn becomes the best one given all other codes and
    scales, then the scale of each row the best one that can be stored. No step raises the sum.

    Source: the codes as in COMQ, arXiv:2403.07134, with the gram in place of the inputs; the
    scale is least squares.
    """
    grid = packed.grid
    codes, scale = torch.empty_like(packed.codes), torch.empty_like(grid.scale)
    diagonal = gram.diagonal()
    ridge = damping * diagonal.sum() / (diagonal != 0).sum().clamp(min=1)
    for here in row_slices(weight):
        state = _Descent(weight[here], packed.codes[here], grid, here)
        for _ in range(passes):
            for group in range(grid.scale.shape[1]):
                state.improve(group, gram, ridge, block)
        codes[here], scale[here] = state.codes.t(), state.scale.t()
    return Packed(codes, replace(grid, scale=scale))


class _Descent:
    """Some rows on their way down; transposed, so that columns are contiguous.

    change: W - Q, (columns, rows).
    """

    def __init__(self, weight: Tensor, codes: Tensor, grid: Grid, here: slice) -> None:
        self.grid = grid
        self.codes = codes.t().contiguous()
        self.scale = grid.scale[here].t().contiguous()
        self.zero = grid.zero[here].t().contiguous()
        self.row_scale = None if grid.row_scale is None else grid.row_scale[here, 0]
        self.size = weight.shape[1] // grid.scale.shape[1]
        self.change = weight.t().contiguous()
        for group in range(len(self.scale)):
            self.change[self.columns(group)] -= self.levels(group) * self.scale[group]

    def columns(self, group: int) -> slice:
        return slice(group * self.size, (group + 1) * self.size)

    def levels(self, group: int) -> Tensor:
        return self.codes[self.columns(group)] - self.zero[group]

    def improve(self, group: int, gram: Tensor, ridge: Tensor, block: int) -> None:
        """Set the codes of one group, and then its scales, to their best."""
        columns, scale, max_code = self.columns(group), self.scale[group], self.grid.max_code
        within = gram[columns, columns].clone()
        within.diagonal().add_(ridge)
        gradient = torch.addmm(self.change[columns] * ridge, gram[columns], self.change)

        # Without input and without damping a column has no best code, and keeps its own.
        curvature = within.diagonal().clone()
        curvature[curvature == 0] = 1
        anchor = self.levels(group) * scale
        moved = torch.addcdiv(anchor, gradient, curvature[:, None])
        feedback = (within / curvature[:, None]).tril_(-1)
        lattice = lattices(scale[None], self.zero[group, None], max_code) * self.size
        self.codes[columns] = round_in_turn(moved, anchor, feedback, lattice, block=block)
        self.change[columns] += moved
        gradient.addmm_(within, moved)

        levels = self.levels(group)
        slope = (levels * gradient).sum(0)
        bend = (levels * (within @ levels)).sum(0)
        best = scale + torch.where(bend > 0, slope / bend, 0.0)
        best = storable(best, dtype=self.grid.dtype, max_code=max_code, row_scale=self.row_scale)
        step = best - scale
        lower = step * (2 * slope - step * bend) > 0
        self.change[columns] -= levels * torch.where(lower, step, 0.0)
        self.scale[group] = torch.where(lower, best, scale)
