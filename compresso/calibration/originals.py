"""What the linears of a block did in the original model, and what they miss of it now."""

from __future__ import annotations

import torch
from torch import Tensor

from compresso.calibration.gram import ProductSum
from compresso.calibration.recording import heard
from compresso.calibration.states import States, Store
from compresso.calibration.tuning import advance
from compresso.calibration.walk import LiveBlock
from compresso.models.adapter import ModelAdapter

GROUPS = 4


class Originals:
    """What flows through the original model, beside the walk of one that is being changed.

    Of a block, it keeps what each of the input groups into attention and into the MLP read, and
    what left the linears out of them, with the residual stream that it was added to. So what a
    linear out of a half can make up for is all that the stream has lost by then. Only in families
    that norm what a half adds (gemma2, gemma3, olmo2) it is what the linear's own output has lost.
    A linear that several blocks use makes up for what is lost in the block that has it.
    """

    def __init__(self, adapter: ModelAdapter, states: States) -> None:
        """states: what enters block 0 of the original model; it goes on with every block.

        They may be of the first few batches alone: of the others, nothing is known then.
        """
        self.states = states
        self._adapter = adapter
        self._kept: Store | None = None
        family = adapter.family
        self._in_stream = (family.attention_output, family.mlp_output) == (
            family.attention,
            family.mlp[1],
        )
        field = family.multiplier if self._in_stream else None
        self._multiplier: float = getattr(adapter.config, field) if field else 1

    def advance(self, index: int) -> None:
        """Run block `index`, which has its original weights now, and keep nothing of it."""
        advance(self._adapter, self.states, index)

    @torch.no_grad()
    def record(self, index: int) -> None:
        """Run block `index`, which has its original weights now, and keep what `gram` needs."""
        if self._kept is None:
            self._kept = self.states.further_store(GROUPS)
        states, block = self.states, self._adapter.blocks[index]
        lacks = [self._adapter.structure.lacks(2 * index + mlp) for mlp in (False, True)]
        paths = {
            group: linears[0]
            for group, linears in enumerate(self._adapter.family.linears)
            if not lacks[group // 2]
        }
        for batch in range(states.batches):
            hidden = states[batch]
            arguments = states.arguments(index, hidden)
            with heard(block, paths.values()) as calls:
                output = block(hidden, *arguments.positional, **arguments.named)
            stream = hidden
            for group, path in paths.items():
                kept = calls[path].input
                if group % 2:
                    stream = kept = self._left(stream, calls[path].output)
                self._kept[self._place(batch, group)] = kept
            states[batch] = output
            states.release(batch)

    def aim_here(self, *, mlp: bool) -> None:
        """Let the linear out of the MLP, or of attention, want the stream as it is now.

        For a half after which the changed model lacks something that has been run since. Does
        nothing in families that norm what a half adds.
        """
        if self._kept is None or not self._in_stream:
            return
        for batch in range(self.states.batches):
            self._kept[self._place(batch, 3 if mlp else 1)] = self.states[batch]
            self.states.release(batch)

    def gram(self, block: LiveBlock, paths: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """The gram of an input group as `LiveBlock.gram` takes it, and what its linears miss.

        paths: some of one input group, which still have their original weights.

        The second is what `kernels.matching.moved` takes for their stacked rows, (rows, columns)
        float32. Exactly zero where nothing was changed before.
        """
        family, adapter = self._adapter.family, self._adapter
        group = next(g for g, linears in enumerate(family.linears) if set(paths) <= set(linears))
        linear = block.module.get_submodule(paths[0])
        rows, columns = adapter.weight(block.module, paths[0]).shape
        missing = ProductSum(rows if group % 2 else columns, columns, adapter.device)

        def watch(batch: int, inputs: Tensor, importance: Tensor | None) -> None:
            if batch >= self.states.batches:
                return
            assert self._kept is not None
            place = self._place(batch, group)
            now = inputs
            if group % 2:
                stream = block.stream(batch, mlp=group > 1) if self._in_stream else inputs
                now = self._left(stream, linear(inputs))
            wanted = self._kept[place]
            missing.add(wanted - now.view_as(wanted), inputs, importance)
            self._kept.release(place)

        gram, product = block.gram(paths, watch=watch), missing.mean()
        if group % 2:
            return gram, product.div_(self._multiplier)
        sizes = [len(adapter.weight(block.module, path)) for path in paths]
        stacked = torch.empty(sum(sizes), columns, device=adapter.device)
        for path, part in zip(paths, stacked.split(sizes), strict=True):
            torch.mm(self._weight(block, path), product, out=part)
        return gram, stacked

    def _left(self, stream: Tensor, output: Tensor) -> Tensor:
        """What a linear out of a half leaves: its output, in the stream if it goes there as it is.

        One way to add for all families, as both models must round alike.
        """
        if not self._in_stream:
            return output
        return stream + self._multiplier * output.view_as(stream)

    def _weight(self, block: LiveBlock, path: str) -> Tensor:
        """What multiplies a linear's input, with the correction of a restructured model."""
        weight = self._adapter.weight(block.module, path).float()
        if hasattr(block.module.get_submodule(path), "correction_up"):
            up, down = (
                block.module.get_parameter(f"{path}.correction_{end}.weight").float()
                for end in ("up", "down")
            )
            weight = weight + up @ down
        return weight

    def _place(self, batch: int, group: int) -> int:
        return batch * GROUPS + group
