"""The original model, run beside the walk of one that was made from it, and may lack blocks."""

from __future__ import annotations

from collections.abc import Sequence

from compresso.calibration.originals import Originals
from compresso.calibration.states import States
from compresso.checkpoint.reader import Checkpoint
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import Structure


class Following:
    """What the linears of a compressed model are wanted to do, block by block.

    A linear wants what the original's had on its own input. The last one of a block that is
    followed by removed blocks or halves wants the stream behind these, so it makes up for them.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        original: Checkpoint,
        states: States,
        blocks: Sequence[int],
        structure: Structure,
    ) -> None:
        """adapter, original: of the original model.

        states:    what enters its block 0; goes on with every block.
        blocks:    for every block of the compressed model, the one that it was. Ascending.
        structure: of the compressed model.
        """
        self.originals = Originals(adapter, states)
        self._adapter = adapter
        self._original = original
        self._blocks = blocks
        self._structure = structure
        self._next = 0

    def follow(self, index: int, *, keep: bool) -> None:
        """Run the original up to what has become of block `index` + 1, or to its end.

        keep: what is wanted of block `index`, for `originals.gram`.
        """
        here, last = self._blocks[index], index + 1 == len(self._blocks)
        until = self._adapter.count if last else self._blocks[index + 1]
        for block in range(self._next, until):
            self._adapter.load_block(block, self._original)
            try:
                if keep and block == here:
                    self.originals.record(block)
                else:
                    self.originals.advance(block)
            finally:
                self._adapter.unload_block(block)
        self._next = until
        no_mlp = self._structure.lacks(2 * index + 1)
        if keep and (until > here + 1 or no_mlp):
            self.originals.aim_here(mlp=not no_mlp)
