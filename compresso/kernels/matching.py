"""Move weights so that they make up for what was changed before them."""

from __future__ import annotations

import torch
from torch import Tensor

from compresso.errors import NumericalError
from compresso.kernels.sweep import row_slices


def moved(
    weight: Tensor, missing: Tensor, gram: Tensor, *, amount: float, damping: float
) -> Tensor:
    """Weights whose output on changed inputs is nearer to what it is wanted to be.

    weight:  W, (rows, columns) float32. Not modified.
    missing: (rows, columns) float32: the mean of (y - W x) x^T over tokens, where x is the input
             as it has become, and y the wanted output. Not modified.
    gram:    G, (columns, columns) float32: the mean of x x^T over the same tokens. Not modified.
    amount:  of the way to the weights W + missing (G + R)^-1, which make the mean of |y - W x|^2
             least but for R; 0 stays at W, and so does nothing missing, bit by bit.
    damping: R is this fraction of the mean of G's diagonal, over columns whose input was not always
             zero; the others stay as they are.

    Raises NumericalError if G + R is not positive definite.

    Source: the aim is that of GPTAQ, Li et al., arXiv:2504.02692; here it is met before rounding,
    by ridge regression, for all columns at once.
    """
    diagonal = gram.diagonal()
    live = diagonal != 0
    mean = torch.where(live.any(), diagonal.sum() / live.sum().clamp(min=1), 1.0)
    ridge = torch.where(live, damping * mean, mean)
    for dtype in dict.fromkeys((gram.dtype, torch.float64)):
        # Of the transpose, which is the same matrix, LAPACK makes the factor in place.
        lower = gram.to(dtype, copy=True).t()
        lower.diagonal().add_(ridge)
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            break
    else:
        raise NumericalError(
            f"gram of {len(gram)} columns is not positive definite with {damping:g} of its mean"
            " added",
            hint="calibrate with more tokens, or pass `--match 0`",
        )
    found = torch.empty_like(weight)
    for here in row_slices(weight):
        step = torch.linalg.solve_triangular(lower, missing[here].t().to(dtype), upper=False)
        step = torch.linalg.solve_triangular(lower.t(), step, upper=True).t().to(weight.dtype)
        torch.add(weight[here], step, alpha=amount, out=found[here])
    return found
