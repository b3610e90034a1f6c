"""Products with a weight that stays codes in memory, for training beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compresso.checkpoint.reader import Checkpoint

Kernel = Callable[[Tensor], Tensor]


class PackedWeight:
    """A linear's weight as the checkpoint stores it, decoded whenever it is asked for.

    kernel: gives the product with inputs, and its gradient, without decoding; None if there is
            none for these codes here.
    """

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
        self.kernel: Kernel | None = None
        if device.type == "cuda" and f"{path}.weight.quant_map" in parts:
            self.kernel = four_bit_kernel(path, self._parts)

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
    if weight.kernel is not None:
        output = weight.kernel(inputs)
    else:
        output = _Product.apply(inputs, weight.decode)
    return output if bias is None else output + bias


def four_bit_kernel(path: str, stored: Mapping[str, Tensor]) -> Kernel:
    """The product of bitsandbytes' own kernels with a 4-bit linear.

    stored: its tensors by name in the checkpoint, where the product is to be computed.

    8-bit linears have none here: theirs rounds inputs, too, and to float16 first.
    """
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    weight = stored[f"{path}.weight"]
    described = {
        name.removeprefix(f"{path}.weight."): part
        for name, part in stored.items()
        if part is not weight
    }
    state = QuantState.from_dict(described, device=weight.device)

    def multiply(inputs: Tensor) -> Tensor:
        output: Tensor = bitsandbytes.matmul_4bit(inputs, weight.t(), quant_state=state)
        return output

    return multiply
