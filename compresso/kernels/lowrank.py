"""The best matrix of low rank: a small correction that brings shared weights near a block's own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.errors import NumericalError

DAMPING = 1e-6  # of the gram's mean diagonal, at first
OVERSAMPLING = 16  # directions followed beside those that are sought
COLD_STEPS, WARM_STEPS = 8, 1  # of power iteration


@dataclass(frozen=True)
class LowRank:
    """A matrix of low rank, `up @ down`.

    up: (rows, rank) float32. down: (rank, columns) float32. Every column of `up` is as long as its
    row of `down`, so that neither leaves the range of float16, and an optimizer that goes on from
    here moves both at the same pace.
    """

    up: Tensor
    down: Tensor

    def product(self) -> Tensor:
        """The whole matrix, (rows, columns) float32."""
        return self.up @ self.down


def truncate(matrix: Tensor, rank: int, gram: Tensor | None = None) -> LowRank:
    """The matrix M of that rank with the least tr((D - M) G (D - M)^T).

    matrix: D, (rows, columns) float32. Not modified.
    rank:   if it is above the smaller side of D, M is D, and the factors end in zeros.
    gram:   G, (columns, columns) float32, the mean of x x^T over the tokens that reach D; the sum
            is then the mean squared error of the output. None for the identity: the error is the
            sum of the squared singular values that are left out.

    With G = C C^T and D C = U S V^T, the best M is U_r S_r V_r^T C^-1, which is U_r U_r^T D: no
    inverse is taken, so that columns that are never used do no harm. C is a Cholesky factor of G
    in float64, damped by a millionth of the diagonal's mean, or more where it takes more.

    Raises NumericalError if a number is not finite.

    Source: Eckart and Young, 1936; with a gram, Wang et al., arXiv:2403.07378 (SVD-LLM), and Liu et
    al., arXiv:2410.21271 (EoRA).
    """
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError("a matrix to approximate by one of low rank is not finite")
    exact = rank >= min(matrix.shape)
    weighted = matrix if gram is None or exact else matrix @ _root(gram).to(matrix.dtype)
    basis = torch.linalg.svd(weighted, full_matrices=False).U[:, :rank]
    found = balanced(basis, basis.T @ matrix)
    up = matrix.new_zeros(len(matrix), rank)
    down = matrix.new_zeros(rank, matrix.shape[1])
    up[:, : basis.shape[1]], down[: basis.shape[1]] = found.up, found.down
    return LowRank(up, down)


def iterated(matrix: Tensor, rank: int, basis: Tensor | None) -> tuple[LowRank, Tensor]:
    """Nearly `truncate(matrix, rank)`, in a time that grows with the rank.

    matrix: (rows, columns) float32. Not modified.
    basis:  (columns, k), k at least the rank: what an earlier call with a matrix near this one
            returned, which saves most of the work; None for a random one, always the same.

    Returns the basis besides. With one, the error is that of `truncate` to a thousandth if the
    earlier matrix was as near as those of two turns of a decomposition are.

    Source: Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4.
    """
    steps = WARM_STEPS
    if basis is None:
        generator = torch.Generator().manual_seed(0)
        shape = matrix.shape[1], rank + OVERSAMPLING
        basis, steps = torch.randn(shape, generator=generator).to(matrix), COLD_STEPS
    for _ in range(steps):
        rows = torch.linalg.qr(matrix @ basis).Q
        basis = torch.linalg.qr(matrix.T @ rows).Q
    rows = torch.linalg.qr(matrix @ basis).Q
    left, values, right = torch.linalg.svd(rows.T @ matrix, full_matrices=False)
    found = balanced(rows @ left[:, :rank], values[:rank, None] * right[:rank])
    return found, right.T.contiguous()


def balanced(up: Tensor, down: Tensor) -> LowRank:
    """The same product, of factors that are alike in size: see `LowRank`. Neither is modified."""
    least = torch.finfo(down.dtype).tiny
    sizes = [torch.linalg.vector_norm(up, dim=0), torch.linalg.vector_norm(down, dim=1)]
    ratio = (sizes[1].clamp(min=least) / sizes[0].clamp(min=least)).sqrt()
    ratio = torch.where((sizes[0] > 0) & (sizes[1] > 0), ratio, 0.0)
    return LowRank(up * ratio, down * torch.where(ratio > 0, 1 / ratio, 0.0)[:, None])


def energies(matrix: Tensor, gram: Tensor | None = None) -> Tensor:
    """What every further rank of `truncate` takes off the error, (smaller side,) float32, falling.

    Arguments as there. All of them together are the error of no correction.
    """
    weighted = matrix if gram is None else matrix @ _root(gram).to(matrix.dtype)
    found: Tensor = torch.linalg.svdvals(weighted)
    return found.square_()


def rank_within(shapes: Iterable[tuple[int, int]], *, parameters: int) -> int:
    """The highest rank at which corrections of all matrices have at most `parameters` weights.

    shapes: (rows, columns) of every matrix. 0 if not even rank 1 fits.
    """
    return max(0, parameters // correction_parameters(shapes, rank=1))


def correction_parameters(shapes: Iterable[tuple[int, int]], *, rank: int) -> int:
    """Weights in the corrections of that rank of matrices of these shapes."""
    return rank * sum(rows + columns for rows, columns in shapes)


def _root(gram: Tensor) -> Tensor:
    """C with C C^T the gram, slightly damped: (columns, columns) float64."""
    scale = gram.diagonal().double().mean().item() or 1.0
    damping = DAMPING
    while damping < 1:
        damped = gram.double()
        damped.diagonal().add_(damping * scale)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor
        damping *= 10
    raise NumericalError(
        f"gram of {len(gram)} columns is not positive definite",
        hint="calibrate with more tokens, or run the model in `--dtype float32`",
    )
