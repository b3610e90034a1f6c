"""Versions of a model that a search may try."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Candidate:
    """A version of the model.

    removed:  sub-blocks that add nothing, numbered in execution order: 2 * block is the block's
              attention, 2 * block + 1 its MLP.
    borrowed: (block, the block whose linears it uses in place of its own), ascending.
    """

    removed: frozenset[int] = frozenset()
    borrowed: tuple[tuple[int, int], ...] = ()

    def halves(self, block: int) -> Halves:
        """Which halves of the block are left."""
        return Halves(2 * block not in self.removed, 2 * block + 1 not in self.removed)

    def weights(self, block: int) -> int:
        """The block whose linears this one uses."""
        return dict(self.borrowed).get(block, block)


class Halves(NamedTuple):
    """Which halves of a block run."""

    attention: bool
    mlp: bool


BOTH, ATTENTION, MLP, NEITHER = (
    Halves(attention, mlp) for attention in (True, False) for mlp in (True, False)
)
