"""Orthogonal matrices that spread each coordinate evenly over all others, and are fast to apply."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, sqrt

import torch
from torch import Tensor

from compresso.kernels.hadamard import block_size, transform


@dataclass(frozen=True)
class Rotation:
    """The orthogonal R = diag(signs) (mixing x H), with x the Kronecker product.

    signs:  (size,) float64, each 1 or -1.
    mixing: (size / block, size / block) float64, orthogonal.
    block:  size of the orthonormal Sylvester Hadamard matrix H, a power of two.
    """

    signs: Tensor
    mixing: Tensor
    block: int

    @property
    def size(self) -> int:
        """How many coordinates it turns."""
        return len(self.signs)

    def apply(self, rows: Tensor) -> Tensor:
        """`rows` R: (..., size) float64, not modified."""
        mixed = transform(rows * self.signs, self.block)
        if len(self.mixing) == 1:
            return mixed
        runs = mixed.unflatten(-1, (len(self.mixing), self.block))
        return (self.mixing.T @ runs).flatten(-2)


def random_rotation(size: int, generator: torch.Generator) -> Rotation:
    """A random rotation of `size` coordinates, on the CPU.

    All its entries are as small as they can be, 1 / sqrt(size), for every size for which Sylvester
    and Paley have a Hadamard matrix. The odd factor of any other size gets a random matrix.
    """
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    power = block_size(size, size)
    odd = size // power
    order = odd if odd == 1 else 4 * odd
    while order <= size:
        if size % order == 0 and (mixing := _paley(order)) is not None:
            return Rotation(signs, mixing / sqrt(order), size // order)
        order *= 2
    return Rotation(signs, _random_orthogonal(odd, generator), power)


def _paley(order: int) -> Tensor | None:
    """A matrix of ones and minus ones with orthogonal rows (Paley 1933), or None."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(order - 1) and order % 4 == 0:
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _jacobsthal(order - 1)
        return skew + torch.eye(order, dtype=torch.float64)
    half = order // 2
    if order % 4 == 0 and half % 4 == 2 and _is_prime(half - 1):
        symmetric = torch.zeros(half, half, dtype=torch.float64)
        symmetric[0, 1:], symmetric[1:, 0] = 1, 1
        symmetric[1:, 1:] = _jacobsthal(half - 1)
        on = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        off = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, on) + torch.kron(torch.eye(half, dtype=torch.float64), off)
    return None


def _jacobsthal(prime: int) -> Tensor:
    """(prime, prime): 1 where row - column is a square modulo `prime`, 0 where it is 0, else -1."""
    character = torch.full((prime,), -1.0, dtype=torch.float64)
    numbers = torch.arange(prime)
    character[numbers**2 % prime] = 1
    character[0] = 0
    return character[(numbers[:, None] - numbers) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, isqrt(number) + 1))


def _random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Uniformly distributed, (size, size) float64."""
    normal = torch.randn(size, size, dtype=torch.float64, generator=generator)
    factor, triangle = torch.linalg.qr(normal)
    return factor * triangle.diagonal().sign()
