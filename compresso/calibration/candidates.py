"""Versions of a model that a search may try."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Candidate:
    """A version of the model.

    removed:  sub-blocks that add nothing, numbered in execution order: 2 * block is the block's
              attention, 2 * block + 1 its MLP.
    borrowed: (block, the block whose linears it uses in place of its own), ascending.
    versions: (block, the name of other weights for it), such as quantized ones, ascending. What
              names stand for is known to the streams; other weights go before borrowed ones.
    """

    removed: frozenset[int] = frozenset()
    borrowed: tuple[tuple[int, int], ...] = ()
    versions: tuple[tuple[int, Hashable], ...] = ()

    def halves(self, block: int) -> Halves:
        """Which halves of the block are left."""
        return Halves(2 * block not in self.removed, 2 * block + 1 not in self.removed)

    def weights(self, block: int) -> Weights:
        """Where the block's weights come from."""
        return Weights(dict(self.borrowed).get(block, block), dict(self.versions).get(block))


class Weights(NamedTuple):
    """Where a block's weights come from.

    linears: the block whose linears it uses. version: the name of other weights; None for none.
    """

    linears: int
    version: Hashable = None


class Halves(NamedTuple):
    """Which halves of a block run."""

    attention: bool
    mlp: bool


BOTH, ATTENTION, MLP, NEITHER = (
    Halves(attention, mlp) for attention in (True, False) for mlp in (True, False)
)
