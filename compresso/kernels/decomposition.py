"""A matrix as codes plus a matrix of low rank, found in turns: LQ-LoRA and LoftQ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from compresso.errors import NumericalError
from compresso.kernels import grid as uniform
from compresso.kernels.grid import Packed
from compresso.kernels.lowrank import OVERSAMPLING, LowRank, balanced, iterated, truncate

LEAST_WEIGHT = 1e-3  # of the root mean square of all, so that what never mattered can be divided by


class Decodable(Protocol):
    """A quantized matrix."""

    def decode(self) -> Tensor:
        """The weights, (rows, columns) float32."""


C = TypeVar("C", bound=Decodable)


@dataclass(frozen=True)
class Fisher:
    """How much the loss depends on the weights of a matrix: a Fisher matrix that is a product.

    rows:    (rows,) float32: root of the mean, over columns and sequences, of squared gradients.
    columns: (columns,) float32: over rows, likewise.
    """

    rows: Tensor
    columns: Tensor

    def loss(self, change: Tensor) -> float:
        """The sum of F times the squares of a change, (rows, columns) float32.

        F_ij is rows_i^2 columns_j^2 over their common mean: the matrix of such a form that has
        these means. Of different matrices, such sums can be added and compared.
        """
        weighted = change * self.rows[:, None] * self.columns
        mean = self.rows.square().mean().item()
        return weighted.square().sum().item() / mean if mean else 0.0

    def scaled(self) -> Fisher:
        """The same with root mean squares of 1, and none so small that nothing divides by it."""
        return Fisher(_scaled(self.rows), _scaled(self.columns))


@dataclass(frozen=True)
class Decomposed(Generic[C]):
    """A matrix as the sum of two.

    codes:   the quantized one. factors: the one of low rank, exact in the type it is stored in.
    errors:  of every turn, the squared error that was left, as a share of the matrix's own square;
             weighted if the decomposition was.
    error:   that of these codes and factors; not more than any of them.
    """

    codes: C
    factors: LowRank
    errors: list[float]
    error: float

    def decode(self) -> Tensor:
        """The sum, (rows, columns) float32."""
        return self.codes.decode() + self.factors.product()


def decompose(
    weight: Tensor,
    quantize: Callable[[Tensor], C],
    *,
    rank: int,
    turns: int,
    first: Literal["factors", "codes"],
    dtype: torch.dtype,
    fisher: Fisher | None = None,
) -> Decomposed[C]:
    """Codes Q and factors of a matrix L of low rank, so that Q + L is near the weight.

    weight:   W, (rows, columns) float32. Not modified.
    quantize: gives the codes of a matrix, (rows, columns) float32.
    rank:     of L; if it is above the smaller side of W, the factors end in zeros.
    turns:    most turns, at least 1. In each, L becomes the best matrix of that rank near W - Q,
              and Q the codes of W - L, or the other way round.
    first:    "factors" is LQ-LoRA, which starts with Q = 0; "codes" is LoftQ, with L = 0.
    dtype:    type the factors are rounded to. Codes that follow make up for that.
    fisher:   near is then meant by `sum_ij (rows_i columns_j)^2 (W - Q - L)_ij^2`.

    It stops when a turn is worse than the one before it. Of the turns it keeps the best, and last
    fits L to its Q once more; LQ-LoRA's own code takes the last, LoftQ a given number.

    Raises NumericalError if a number is not finite.

    Source: Guo et al., arXiv:2311.12023, Algorithm 1 and section 3.2; Li et al., arXiv:2310.08659,
    Algorithm 1.
    """
    space = _Space(weight, rank, dtype, fisher)
    low = space.fit(weight) if first == "factors" else None
    errors: list[float] = []
    best: tuple[C, LowRank] | None = None
    while len(errors) < turns and (len(errors) < 2 or errors[-1] <= errors[-2]):
        codes = quantize(weight if low is None else weight - low.product())
        rest = weight - codes.decode()
        if low is None or first == "codes":
            low = space.fit(rest)
        error = space.error(rest - low.product())
        if best is None or error < min(errors):
            best = codes, low
        errors.append(error)
        if first == "factors":
            low = space.fit(rest)
    assert best is not None
    return _polished(space, weight, best, errors)


def quantize(
    weight: Tensor,
    gram: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    grid: Literal["mse", "minmax"],
    scale_dtype: torch.dtype,
    scale_bits: int = 16,
    rank: int,
    turns: int,
    importance: Fisher | None = None,
) -> Decomposed[Packed]:
    """Codes of a uniform grid, and factors beside them: the `lq-lora` method.

    Arguments as in `grid.quantize` and `decompose`, of which `importance` is the Fisher matrix.
    gram: has no part in this method.
    """

    def to_grid(matrix: Tensor) -> Packed:
        return uniform.quantize(
            matrix,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            grid=grid,
            scale_dtype=scale_dtype,
            scale_bits=scale_bits,
        )

    return decompose(
        weight,
        to_grid,
        rank=rank,
        turns=turns,
        first="factors",
        dtype=scale_dtype,
        fisher=importance,
    )


def _polished(
    space: _Space, weight: Tensor, best: tuple[C, LowRank], errors: list[float]
) -> Decomposed[C]:
    """The best turn, with factors that are fitted to its codes."""
    codes, low = best
    rest = weight - codes.decode()
    fitted = space.fit(rest)
    error = space.error(rest - fitted.product())
    if error < min(errors):
        return Decomposed(codes, fitted, errors, error)
    return Decomposed(codes, low, errors, min(errors))


class _Space:
    """Distances between matrices, and the nearest ones of low rank, by a Fisher matrix.

    Of large matrices, each nearest one is sought from that of the matrix before it.
    """

    def __init__(
        self, weight: Tensor, rank: int, dtype: torch.dtype, fisher: Fisher | None
    ) -> None:
        if not bool(torch.isfinite(weight).all()):
            raise NumericalError("a matrix to decompose is not finite")
        self._rank = rank
        self._dtype = dtype
        self._fisher = None if fisher is None else fisher.scaled()
        self._whole = self._square(weight) or 1.0
        self._exact = 2 * (rank + OVERSAMPLING) > min(weight.shape)
        self._basis: Tensor | None = None

    def fit(self, matrix: Tensor) -> LowRank:
        """The nearest matrix of the rank, its factors rounded."""
        weighted = self._weighted(matrix)
        if self._exact:
            found = truncate(weighted, self._rank)
        else:
            found, self._basis = iterated(weighted, self._rank, self._basis)
        if (fisher := self._fisher) is not None:
            found = balanced(found.up / fisher.rows[:, None], found.down / fisher.columns)
        return LowRank(*(one.to(self._dtype).to(one.dtype) for one in (found.up, found.down)))

    def error(self, rest: Tensor) -> float:
        """The squared size of a difference, as a share of the weight's."""
        return self._square(rest) / self._whole

    def _square(self, matrix: Tensor) -> float:
        return self._weighted(matrix).square().sum().item()

    def _weighted(self, matrix: Tensor) -> Tensor:
        if (fisher := self._fisher) is None:
            return matrix
        return matrix * fisher.rows[:, None] * fisher.columns


def _scaled(values: Tensor) -> Tensor:
    size = values.square().mean().sqrt()
    if not size > 0:
        return torch.ones_like(values)
    return (values / size).clamp_(min=LEAST_WEIGHT)
