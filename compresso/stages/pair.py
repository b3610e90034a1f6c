"""A compressed model and its original, linear by linear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.calibration.opening import open_adapter
from compresso.checkpoint.reader import Checkpoint
from compresso.models.adapter import ModelAdapter
from compresso.models.corrected import BIAS, DOWN, UP
from compresso.runtime import Runtime
from compresso.stages.original import block_map


@dataclass(frozen=True)
class Pair:
    """Two models whose linears have the same shapes.

    adapter, source: the compressed one. theirs, original: the other.
    blocks: for every block of the compressed one, the block of the original that it was.
    """

    adapter: ModelAdapter
    source: Checkpoint
    theirs: ModelAdapter
    original: Checkpoint
    blocks: list[int]

    @classmethod
    def open(cls, source: Checkpoint, original: Checkpoint, runtime: Runtime) -> Pair:
        """Raises as `ModelAdapter.open` and `block_map` do."""
        adapter = open_adapter(source, runtime)
        theirs = open_adapter(original, runtime, dtype=adapter.dtype)
        return cls(adapter, source, theirs, original, block_map(source, original))

    def groups(self, index: int) -> Iterator[tuple[str, ...]]:
        """The linears that a block runs, by input group, in execution order."""
        for group, paths in enumerate(self.adapter.family.linears):
            if not self.adapter.structure.lacks(2 * index + (group >= 2)):
                yield paths

    def paths(self, index: int) -> list[str]:
        """The linears that a block runs, in execution order."""
        return [path for paths in self.groups(index) for path in paths]

    def name(self, index: int, path: str) -> str:
        """What the checkpoint calls a linear of a block, though another may have its weights."""
        return f"{self.adapter.block_prefix(index)}{path}"

    def origin(self, index: int, path: str) -> str:
        """What the original calls the linear that a block's was; of shared ones, their owner's."""
        owner = self.theirs.structure.owner(self.blocks[index])
        return f"{self.theirs.block_prefix(owner)}{path}"

    def weight(self, index: int, path: str) -> Tensor:
        """A linear's weight, (out, in) float32, without what corrects it in its block."""
        owner = self.adapter.structure.owner(index)
        return self._load(self.source, f"{self.name(owner, path)}.weight")

    def whole(self, index: int, path: str) -> Tensor:
        """The original's weight, (out, in) float32, with what corrects it there."""
        block, structure = self.blocks[index], self.theirs.structure
        owner = self.theirs.block_prefix(structure.owner(block))
        weight = self._load(self.original, f"{owner}{path}.weight")
        if block in structure.corrected:
            name = f"{self.theirs.block_prefix(block)}{path}"
            factors = self.original.load_weights([f"{name}.{UP}", f"{name}.{DOWN}"])
            up, down = (one.to(weight.device, torch.float32) for one in factors.values())
            weight = weight + up @ down
        return weight

    def bias(self, index: int, path: str) -> Tensor:
        """What a linear's bias lacks of the original's, (out,) float32."""
        block, structure = self.blocks[index], self.theirs.structure
        owner = self.adapter.structure.owner(index)
        now = f"{self.name(owner, path)}.bias"
        then = f"{self.theirs.block_prefix(structure.owner(block))}{path}.bias"
        whole = self.original.load_weights([then])[then].float()
        if block in structure.corrected:
            own = f"{self.theirs.block_prefix(block)}{path}.{BIAS}"
            whole = whole + self.original.load_weights([own])[own].float()
        return whole - self.source.load_weights([now])[now].float()

    def shape(self, index: int, path: str) -> tuple[int, int]:
        """(out, in) of a linear."""
        owner = self.adapter.structure.owner(index)
        rows, columns = self.source.weight_info(f"{self.name(owner, path)}.weight").shape
        return (columns, rows) if self.adapter.family.transposed else (rows, columns)

    def differs(self, index: int) -> bool:
        """Whether a linear of a block has not the weight that it had."""
        return any(
            not torch.equal(self.weight(index, path), self.whole(index, path))
            for path in self.paths(index)
        )

    def stored(self, index: int | None) -> list[str]:
        """Names of the tensors that are stored of a block, or of none."""
        if index is not None:
            prefix = self.adapter.block_prefix(index)
            return [name for name in self.source.names() if name.startswith(prefix)]
        blocks = tuple(self.adapter.block_prefix(block) for block in range(self.adapter.count))
        return [name for name in self.source.names() if not name.startswith(blocks)]

    def _load(self, checkpoint: Checkpoint, name: str) -> Tensor:
        weight = checkpoint.load_weights([name])[name].to(self.adapter.device, torch.float32)
        return weight.T.contiguous() if self.adapter.family.transposed else weight
