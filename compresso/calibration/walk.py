"""Walk a model block by block with only one block's weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor, nn

from compresso.calibration.attention import ReceivedAttention, token_importance
from compresso.calibration.gram import GramSum
from compresso.calibration.parts import Parts
from compresso.calibration.recording import Recording, StandIn, silent
from compresso.calibration.states import States, Store, enter_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.models.adapter import ModelAdapter
from compresso.models.substitution import replaced

Sink = Callable[[Tensor], None]
# Takes the number of a batch, the inputs of a group in it, and what the tokens count, if not alike.
Watch = Callable[[int, Tensor, Tensor | None], None]

__all__ = ["LiveBlock", "Parts", "States", "enter_blocks", "never", "walk_blocks"]


def never(index: int) -> dict[str, Tensor] | None:
    """No block was finished earlier."""
    return None


def walk_blocks(
    adapter: ModelAdapter,
    source: Checkpoint,
    states: States,
    *,
    restore: Callable[[int], dict[str, Tensor] | None] = never,
    keep: Sequence[int] | None = None,
    after: Callable[[LiveBlock], None] | None = None,
) -> Iterator[LiveBlock]:
    """Yield each block in order; run it once the caller asks for the next.

    The caller may change the block's weights while it holds it, so every later block is
    calibrated on the error already made. The weights are freed before the next block is loaded.

    states:  what enters the first block; afterwards, what leaves the last.
    restore: gives the finished dense tensors of a block, by name in the checkpoint, or None to
             load it from `source`. A restored block needs no more work and is only run. A block
             whose linears later ones use is asked for again with each of them.
    keep:    indices of the blocks to walk, for a model that has lost the others; None for all.
    after:   called with each block when it has been run and its weights are still there.
    """
    for index in range(adapter.count) if keep is None else keep:
        owner = adapter.structure.owner(index)
        borrowed = restore(owner) if owner != index else None
        finished = restore(index)
        adapter.load_block(index, source, {**(borrowed or {}), **(finished or {})})
        block = LiveBlock(adapter, states, index, restored=finished is not None)
        try:
            yield block
            block.finish()
            if after is not None:
                after(block)
        finally:
            adapter.unload_block(index)


class LiveBlock:
    """A block with its weights loaded, and everything that will be fed to it.

    index:    of the block in the model. module: the block, with real weights.
    restored: its weights came from an earlier, interrupted run.

    No part of the block is run twice on the same batch if memory allows: what reaches the last
    linear of attention and of the MLP is recorded while its gram is taken, and played back from
    then on.
    """

    def __init__(
        self, adapter: ModelAdapter, states: States, index: int, *, restored: bool
    ) -> None:
        self.index = index
        self.module: nn.Module = adapter.blocks[index]
        self.restored = restored
        self._adapter = adapter
        self._family = adapter.family
        self._states = states
        self._attention: Recording | None = None
        self._mlp: Recording | None = None
        self._importance: list[Tensor] = []  # of the tokens of every batch, once they are weighed
        self._batch = 0  # the one being run
        self._left = 0  # how many batches of the states have left the block already
        parallel = self._family.parallel
        self._parallel = parallel is not None and bool(getattr(adapter.config, parallel))
        scale = self._family.multiplier
        self._multiplier: float = getattr(adapter.config, scale) if scale else 1

    def weigh_tokens(self, least: float) -> None:
        """Let tokens count in every later gram by the attention they receive in this block.

        The weights are taken as they are now: ask before any is changed. Costs the linears into
        attention and its probabilities, once more. Where there is no attention, all count alike.

        least: see `token_importance`.

        Raises ConfigError if the model's attention does not show its probabilities.
        """
        self._check_input()
        if self._lacks(mlp=False):
            return
        path = self._family.linears[1][0]
        found: list[Tensor] = []
        with replaced(self.module, {path: self._silent_after(_nowhere), **self._mlp_to(_nowhere)}):
            for batch in range(self._states.batches):
                with ReceivedAttention() as attention:
                    self._run_batch(batch)
                found.append(token_importance(attention.received, least=least))
        self._importance = found

    def gram(self, paths: tuple[str, ...], *, watch: Watch | None = None) -> Tensor:
        """Mean of x x^T over the tokens reaching an input group, (columns, columns) float32.

        Tokens count as `weigh_tokens` found, and all alike if it was not called.

        The weights are taken as they are now. Ask in execution order, and change no weight that
        a later group's input depends on once that group's gram was taken: RuntimeError.

        paths: one or more linears of one group of `family.linears`, own or shared.
        watch: is shown all that the gram is taken of.

        Raises ValueError if they are not, or the block lacks them.
        """
        self._check_input()
        groups = [g for g, group in enumerate(self._family.linears) if set(paths) <= set(group)]
        if not paths or not groups:
            raise ValueError(f"{paths} are not linears of one input group")
        group = groups[0]
        if self._lacks(mlp=group >= 2):
            raise ValueError(f"block {self.index} has no {'MLP' if group >= 2 else 'attention'}")
        total = GramSum(self._columns(paths[0]), self._adapter.device)

        def add(inputs: Tensor) -> None:
            importance = self._importance[self._batch] if self._importance else None
            total.add(inputs, importance)
            if watch is not None:
                watch(self._batch, inputs, importance)

        if group == 0:
            self._sweep({**self._attention_to(add), **self._mlp_to(_nowhere)})
        elif group == 1:
            self._record_attention(add)
        elif group == 2:
            self._sweep({**self._played_attention(), **self._mlp_to(add)})
        else:
            self._record_mlp(add)
        return total.mean()

    def stream(self, batch: int, *, mlp: bool) -> Tensor:
        """The residual stream, (B, T, d), that the output of attention or of the MLP is added to.

        For families that norm neither; of the MLP, only while the gram of its last group is taken.
        """
        hidden = self._states[batch]
        if not mlp or self._attention is None:
            return hidden
        return hidden + self._multiplier * self._attention.output(batch).view_as(hidden)

    def forget(self) -> None:
        """Let all weights of the block be changed once more: what was recorded runs again."""
        self._attention = self._mlp = None

    def forward_with_parts(self) -> Iterator[Parts]:
        """Run the block, batch by batch, and say what each of its halves did."""
        family, scale = self._family, self._multiplier
        added: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
                added[name] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [
            self.module.get_submodule(path).register_forward_hook(keep(name))
            for name, path in (("attention", family.attention_output), ("mlp", family.mlp_output))
        ]
        try:
            for batch in range(self._left, self._states.batches):
                hidden = self._states[batch]
                output = self._run(hidden)
                attention = scale * added.pop("attention").view_as(hidden)
                mlp = scale * added.pop("mlp").view_as(hidden)
                yield Parts(hidden, attention, mlp, output, self._parallel)
                self._states[batch] = output
                self._left = batch + 1
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> None:
        """Replace the hidden states that enter the block by those that leave it."""
        standing_in: dict[str, nn.Module] = {}
        if self._attention is not None:
            standing_in |= self._played_attention()
        if self._mlp is not None:
            standing_in |= self._played_mlp(self._mlp)
        with replaced(self.module, standing_in):
            for batch in range(self._left, self._states.batches):
                self._states[batch] = self._run_batch(batch)
                self._left = batch + 1
        self._attention = self._mlp = None
        if self._states.probe is not None:
            self._states.probe = self._run(self._states.probe)

    def _run(self, hidden: Tensor) -> Tensor:
        arguments = self._states.arguments(self.index, hidden)
        output: Tensor = self.module(hidden, *arguments.positional, **arguments.named)
        return output

    def _run_batch(self, batch: int) -> Tensor:
        self._batch = batch
        output = self._run(self._states[batch])
        self._states.release(batch)
        if self._attention is not None:
            self._attention.release(batch)
        return output

    def _sweep(self, standing_in: dict[str, nn.Module]) -> None:
        with replaced(self.module, standing_in):
            for batch in range(self._states.batches):
                self._run_batch(batch)

    def _record_attention(self, sink: Sink) -> None:
        """Run attention up to its last linear; keep what reaches that, and give it to `sink`."""
        path = self._family.linears[1][0]
        width = max(self._columns(path), self._states.width)  # of its input, then of its output
        self._attention = recording = self._recording(1, self._states.attention_store(width))

        def keep(inputs: Tensor) -> None:
            recording.put(self._batch, inputs)
            sink(inputs)

        self._sweep({path: self._silent_after(keep), **self._mlp_to(_nowhere)})

    def _record_mlp(self, sink: Sink) -> None:
        """Run the MLP up to its last linear, in the same way; only keep what RAM has room for."""
        path = self._family.linears[3][0]
        standing_in = self._played_attention()
        store = self._states.mlp_store(self._columns(path))
        self._mlp = recording = None if store is None else self._recording(3, store)

        def keep(inputs: Tensor) -> None:
            if recording is not None:
                recording.put(self._batch, inputs)
            sink(inputs)

        self._sweep({**standing_in, path: self._silent_after(keep)})

    def _recording(self, group: int, store: Store) -> Recording:
        later = [path for linears in self._family.linears[group:] for path in linears]
        return Recording(self.module, self._family.linears[group][0], store, later=later)

    def _played_attention(self) -> dict[str, nn.Module]:
        if self._lacks(mlp=False):
            return {}
        if self._attention is None:
            self._record_attention(_nowhere)
        recording = self._attention
        assert recording is not None
        recording.settle()
        player = StandIn(lambda _: recording.output(self._batch), attention=True)
        return {self._family.attention: player}

    def _played_mlp(self, recording: Recording) -> dict[str, nn.Module]:
        recording.settle()
        player = StandIn(lambda _: recording.output(self._batch))
        first, last = self._family.mlp
        return {first: self._silent_after(_nowhere), last: player}

    def _attention_to(self, sink: Sink) -> dict[str, nn.Module]:
        return {self._family.attention: self._silent_after(sink, attention=True)}

    def _mlp_to(self, sink: Sink) -> dict[str, nn.Module]:
        first, last = self._family.mlp
        return {last: self._silent_after(_nowhere), first: self._silent_after(sink)}

    def _silent_after(self, sink: Sink, *, attention: bool = False) -> StandIn:
        return silent(sink, self._states.width, attention=attention)

    def _check_input(self) -> None:
        if self._left:
            raise RuntimeError(f"block {self.index} has been run: its input is gone")

    def _lacks(self, *, mlp: bool) -> bool:
        return self._adapter.structure.lacks(2 * self.index + mlp)

    def _columns(self, path: str) -> int:
        return self._adapter.weight(self.module, path).shape[1]


def _nowhere(inputs: Tensor) -> None:
    """A sink that keeps nothing."""
