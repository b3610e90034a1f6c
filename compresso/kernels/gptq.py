"""GPTQ: round a weight matrix so that the outputs of its linear change least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compresso.errors import NumericalError
from compresso.kernels.descent import descend
from compresso.kernels.grid import Grid, Packed, fit_grid
from compresso.kernels.sweep import lattices, round_in_turn, row_slices

ROOM = 1.15  # of scales that descent will change: without it, one of ten would stay too small


@dataclass(frozen=True)
class Factor:
    """What rounding needs to know of a gram G: `P G P^T = (F + I)^T diag(pivots) (F + I)`.

    P puts the columns in `order`, and G is damped. A change d of the weights costs
    `sum_j pivots_j (d_j + sum_{i<j} F_ji d_i)^2`: once the columns before j are rounded, column j
    is best rounded from its weight plus their changes times row j of F.

    feedback: F, (columns, columns) float32, zero on and above the diagonal.
    pivots:   (columns,) float32, squared units of the layer's input.
    order:    (columns,) int64, the columns in the order they are rounded in.
    """

    feedback: Tensor
    pivots: Tensor
    order: Tensor


def factorize(gram: Tensor, *, damping: float, act_order: bool = True) -> Factor:
    """Prepare a gram for `round_gptq`; all linears that read the same input share the result.

    gram:      (columns, columns) float32: the mean of x x^T over tokens. Not modified.
    damping:   fraction of the diagonal's mean added to it; the mean is over columns whose input
               was not always zero. The others neither move a column nor are moved.
    act_order: take the columns by falling diagonal, so that errors end up where they cost least.

    The usual way, a Cholesky factor of the inverse, costs four times as much and loses digits to
    the inversion: this one factors the reversed gram itself. float32 is enough at any sensible
    damping; if rounding makes a pivot negative, float64 is tried.

    Raises NumericalError if the damped gram is not positive definite; the caller decides whether
    to try more damping.

    Source: Frantar et al., arXiv:2210.17323, in the form of Chee et al., arXiv:2307.13304, sec. 4.
    """
    diagonal = gram.diagonal()
    order = torch.arange(len(gram), device=gram.device)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    live = diagonal != 0
    mean = torch.where(live.any(), diagonal.sum() / live.sum().clamp(min=1), 1.0)
    ridge = torch.where(live, damping * mean, mean)[order]
    for dtype in dict.fromkeys((gram.dtype, torch.float64)):
        feedback = gram[order[:, None], order].to(dtype)
        feedback.diagonal().add_(ridge)
        if _factor_in_place(feedback):
            break
    else:
        raise NumericalError(
            f"gram of {len(gram)} columns is not positive definite at damping {damping:g}",
            hint="calibrate with more tokens or raise `damping`",
        )
    feedback = feedback.to(gram.dtype)
    roots = feedback.diagonal().clone()
    return Factor(feedback.div_(roots[:, None]).tril_(-1), roots.square(), order)


def _factor_in_place(matrix: Tensor) -> bool:
    """Overwrite a symmetric matrix by the lower triangular L with L^T L the matrix.

    Makes nothing else as large: a gram and its factor are most of what a block needs. Returns
    whether the matrix was positive definite; if not, it is spoilt.
    """
    # LAPACK has L L^T only, so rows and columns are reversed. It stores by columns: handed the
    # transpose, which is the same matrix, it works in place and leaves L^T in `matrix`.
    _reverse(matrix)
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix.t(), out=(matrix.t(), failed))
    _reverse(matrix)
    return not failed


def _reverse(matrix: Tensor, *, step: int = 64) -> None:
    """Reverse the order of the rows and of the columns of a square matrix, in place."""
    count = len(matrix)
    for start in range(0, count // 2, step):
        stop = min(start + step, count // 2)
        top, bottom = matrix[start:stop], matrix[count - stop : count - start]
        held = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(held)
    if count % 2:
        matrix[count // 2] = matrix[count // 2].flip(0)


def round_gptq(weight: Tensor, factor: Factor, grid: Grid, *, block: int = 32) -> Packed:
    """Choose codes that nearly minimise tr((W - Q) G (W - Q)^T).

    weight: W, (rows, columns) float32, or float64 like the factor and the grid. Not modified.
    factor: of the gram G.
    grid:   codes come from this grid, which is fixed before rounding starts; groups stay in place
            whatever the order of the columns.
    block:  columns between matrix products. Changes the speed; changes the codes only through
            float32 rounding.

    Source: Frantar et al., arXiv:2210.17323, Algorithm 1, with updates in a binary tree of blocks.
    """
    rows, columns = weight.shape
    order, feedback = factor.order, factor.feedback
    place = order.argsort()
    groups = (order // (columns // grid.scale.shape[1])).tolist()
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    for here in row_slices(weight):
        by_group = lattices(grid.scale[here].t(), grid.zero[here].t(), grid.max_code)
        lattice = [by_group[group] for group in groups]
        anchor = weight[here].t().contiguous()[order]
        rounded = round_in_turn(anchor.clone(), anchor, feedback, lattice, block=block)
        codes[here] = rounded[place].t()
    return Packed(codes, grid)


def quantize(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    grid: Literal["mse", "minmax"],
    damping: float,
    act_order: bool,
    scale_dtype: torch.dtype,
    scale_bits: int = 16,
    refine: int = 3,
) -> Packed:
    """Fit a grid, round on it and refine both: the `gptq` method.

    weight: (rows, columns) float32: the stacked rows of all linears that read the same input.
            Not modified.
    gram:   (columns, columns) float32: the mean of x x^T over tokens of that input. Not modified.
    refine: passes of `descend`; 0 is plain GPTQ.

    Other arguments as in `fit_grid`, `factorize` and `round_gptq`. Rounding with feedback changes
    two things for the fit, both measured. What is rounded spreads wider than the weights, so cubes
    of errors are summed: at 2 bits the KL divergence is 12 % below that with squares. And errors
    are weighted by the root of the gram's diagonal: without feedback the diagonal itself would be
    right, but part of every error moves to other columns.

    Raises NumericalError as `factorize` does.
    """
    fitted = fit_grid(
        weight,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        scale_bits=scale_bits,
        search=grid,
        importance=gram.diagonal().sqrt(),
        power=3,
        room=ROOM,
    )
    factor = factorize(gram, damping=damping, act_order=act_order)
    packed = round_gptq(weight, factor, fitted)
    del factor  # as large as the gram
    return descend(weight, packed, gram, damping=damping, passes=refine)


def relative_error(weight: Tensor, decoded: Tensor, gram: Tensor | None = None) -> float:
    """Energy of the change of the output over that of the output, on the gram's tokens.

    weight, decoded: (rows, columns), of any floating type; the sums are in float32.
    gram:            (columns, columns) float32; None for uncorrelated inputs, which gives the
                     squared error of the weight over its own square.

    0 is lossless, 1 is what a matrix of zeros has. 0 if the output has no energy.
    """

    def energy(rows: Tensor) -> Tensor:
        return torch.sum(rows.square() if gram is None else (rows @ gram).mul_(rows))

    lost, whole = weight.new_zeros(2, dtype=torch.float32)
    for here in row_slices(weight):
        rows = weight[here].float()
        lost += energy(rows - decoded[here].float())
        whole += energy(rows)
    return (lost / whole).item() if whole > 0 else 0.0
