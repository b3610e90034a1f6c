"""Where corrections go: into the weights, beside them as an adapter, or into the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from compresso.kernels.lowrank import LowRank

Factors = dict[str, LowRank]  # by path of the linear in the checkpoint


@dataclass(frozen=True)
class Settled:
    """A correction as it is stored.

    change:  what it adds to the weight, (rows, columns) float32.
    tensors: what is stored for it among those of the block, by name, in place of any others.
    factors: what is stored for it beside them; None for nothing.
    """

    change: Tensor
    tensors: dict[str, Tensor]
    factors: LowRank | None

    @property
    def nbytes(self) -> int:
        """Bytes that are stored for it, and would not be without."""
        if self.factors is not None:
            return self.factors.up.numel()
        return 0


class Form(Protocol):
    """A way to store corrections, and to run a block with them."""

    def settle(self, name: str, weight: Tensor, found: LowRank) -> Settled:
        """A correction in the numbers that are stored.

        name: of the linear in the checkpoint. weight: without it, (rows, columns) float32.
        """
        ...

    def put(self, block: nn.Module, path: str, weight: Tensor, settled: Settled) -> None:
        """Let a loaded block's linear run with it."""
        ...

    def restored(self, tensors: dict[str, Tensor], factors: Factors) -> dict[str, Tensor]:
        """The dense tensors of a block, from what is stored of it and beside it."""
        ...
