"""Products with a weight that stays codes in memory, for training beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compresso.checkpoint.reader import Checkpoint


class PackedWeight:
    """A linear's weight as the checkpoint stores it, decoded whenever it is asked for."""

    def __init__(
        self,
        source: Checkpoint,
        path: str,
        *,
        transposed: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """path: of a packed linear in the checkpoint. transposed: its dense weight is (in, out)."""
        self._packing = source.packing
        self._path = path
        self._transposed = transposed
        self._stored = source.dtype
        self._dtype = dtype
        parts = source.load(self._packing.names(path))
        self._parts = {name: part.to(device) for name, part in parts.items()}

    @property
    def nbytes(self) -> int:
        """Bytes it holds."""
        return sum(part.nbytes for part in self._parts.values())

    def decode(self) -> Tensor:
        """(out, in), with the values that a reader of the checkpoint gets."""
        with torch.no_grad():
            weight = self._packing.decode(self._path, self._parts).to(self._stored).to(self._dtype)
        return weight.T if self._transposed else weight


class _Product(torch.autograd.Function):
    """x W^T, with W made anew on the way back instead of being kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, decode: Callable[[], Tensor]) -> Tensor:
        ctx.decode = decode
        return inputs @ decode().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.decode(), None


def product(inputs: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """What a linear of that weight answers, (..., in) -> (..., out).

    The weight is decoded for the product and again for its gradient, and never kept.
    """
    output: Tensor = _Product.apply(inputs, weight.decode)
    return output if bias is None else output + bias
