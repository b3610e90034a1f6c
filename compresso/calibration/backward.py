"""The gradient of the loss with only one block's weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresso.calibration.states import States, Store
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError, NumericalError, ResourceError
from compresso.kernels.divergence import cross_entropy
from compresso.models.adapter import ModelAdapter
from compresso.models.substitution import put_parameter

LOGITS_BYTES = 64 * 2**20  # of one copy; the loss and its gradient need about four
FLOAT32_BYTES = 4

Score = Callable[[Tensor, slice], Tensor]
AfterBatch = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class BackwardBlock:
    """A block with its weights and their gradients, both float32.

    index:  of the block in the model.
    module: the block. Every parameter's `.grad` is that of `loss`, summed over all batches; of a
            linear that several blocks use, it is what this block's use adds.
    loss:   mean cross-entropy of the next token over all tokens that have one, in nats.
    tokens: how many those are.
    """

    index: int
    module: nn.Module
    loss: float
    tokens: int


def walk_back(
    adapter: ModelAdapter,
    source: Checkpoint,
    batches: list[Tensor],
    *,
    budget: int,
    spill_dir: Path | None,
    after_batch: AfterBatch | None = None,
) -> Iterator[BackwardBlock]:
    """Yield each block with the gradient of the loss, the last block first.

    The model is run forward once, block by block, and what enters each block is kept. On the way
    back a block is run again from there, so that no more than one is ever loaded. That second run
    and all gradients are float32, whatever the adapter's type; only the head is in that type.
    Works the same whether or not the caller has gradients switched off.

    batches:     token ids, (B, T) int64 each, without padding.
    budget:      bytes of hidden states, and of gradients at them, to hold in RAM.
    spill_dir:   where more of them go.
    after_batch: called with a batch's number and the block when that batch's part has been added
                 to every `.grad`; may take it and set `.grad` to None, to sum something else.

    Peak memory: one block's weights and gradients in float32, what it keeps of one batch for the
    way back, and the budget. Hidden states need tokens x width numbers of the adapter's type for
    every block and the head, and gradients as many of float32 once.

    Raises ConfigError if no token has a next one, NumericalError if the loss or a gradient is not
    finite, ResourceError if the hidden states fit neither RAM nor disk.
    """
    passage = _Passage(adapter, source, batches, budget=budget, spill_dir=spill_dir)
    loss = passage.forward()
    for index in reversed(range(adapter.count)):
        block = adapter.load_block(index, source)
        used: list[str] = []
        try:
            used += _require_gradients(adapter.model)
            for batch in range(len(batches)):
                passage.backward(index, batch)
                if after_batch is not None:
                    after_batch(batch, block)
            yield BackwardBlock(index, block, loss, passage.targets)
        finally:
            adapter.unload_block(index)
            for name in used:  # without data, but with a type
                empty = adapter.model.get_parameter(name).detach().to(adapter.dtype)
                put_parameter(adapter.model, name, empty)


def head_gradient(
    adapter: ModelAdapter,
    source: Checkpoint,
    hidden: Tensor,
    score: Score,
    *,
    positions: int | None = None,
) -> tuple[float, Tensor]:
    """A sum over positions of a score of the logits, and its gradient at `hidden`.

    hidden:    what the last block returns, (B, T, d). Not modified.
    score:     given the logits of some positions, (B, t, vocabulary) float32, and which they are,
               the sum of their scores, a scalar.
    positions: take only so many from the start; the gradient at the others is 0.

    Returns the gradient as (B, T, d) float32. Needs about 256 MB beside the head: positions are
    taken a few at a time.
    """
    rows, length, _ = hidden.shape
    step = max(1, LOGITS_BYTES // (FLOAT32_BYTES * _vocabulary(adapter) * rows))
    gradient = torch.zeros_like(hidden, dtype=torch.float32)
    total = 0.0
    end = length if positions is None else positions
    for start in range(0, end, step):
        part = slice(start, min(start + step, end))
        with torch.enable_grad():
            piece = hidden[:, part].detach().float().requires_grad_()
            scored = score(adapter.logits(source, piece), part)
            (gradient[:, part],) = torch.autograd.grad(scored, piece)
        total += scored.item()
    return total, gradient


class _Passage:
    """What enters each block, and the gradient at what the block on the way back returned."""

    def __init__(
        self,
        adapter: ModelAdapter,
        source: Checkpoint,
        batches: list[Tensor],
        *,
        budget: int,
        spill_dir: Path | None,
    ) -> None:
        self.targets = sum(batch[:, 1:].numel() for batch in batches)
        if not self.targets:
            raise ConfigError(
                "no token of the calibration has a next one", hint="use sequences of 2 or more"
            )
        self._adapter = adapter
        self._source = source
        self._batches = batches
        self._arguments = States(adapter, [], budget=0, spill_dir=None)  # holds no states itself
        sizes = [adapter.dtype.itemsize] * (adapter.count + 1)
        largest = max(batch.numel() for batch in batches) * int(adapter.config.hidden_size)
        needed = len(batches) * largest * (sum(sizes) + FLOAT32_BYTES)
        if needed > budget and spill_dir is None:
            raise ResourceError(
                f"hidden states need {needed / 1e9:.2f} GB, but `max_memory` is "
                f"{budget / 1e9:.2f} GB",
                hint="allow more memory or use fewer samples",
            )
        stores = []
        for size in [FLOAT32_BYTES, *sizes]:
            fits = len(batches) * largest * size <= budget
            store = Store(
                len(batches),
                batch_bytes=largest * size,
                device=adapter.device,
                spill_dir=None if fits else spill_dir,
            )
            budget -= store.ram_bytes
            stores.append(store)
        self._gradient, *self._entering = stores

    @torch.no_grad()
    def forward(self) -> float:
        """Run everything; the loss."""
        adapter, entering = self._adapter, self._entering
        for batch, tokens in enumerate(self._batches):
            entering[0][batch] = self._arguments.enter(self._source, tokens)
        adapter.unload_outside()
        for index in range(adapter.count):
            block = adapter.load_block(index, self._source)
            try:
                for batch in range(len(self._batches)):
                    hidden = entering[index][batch]
                    arguments = self._arguments.arguments(index, hidden)
                    output = block(hidden, *arguments.positional, **arguments.named)
                    entering[index + 1][batch] = output
                    entering[index].release(batch)
            finally:
                adapter.unload_block(index)
        loss = sum(map(self._loss, range(len(self._batches))))
        adapter.unload_outside()
        if not isfinite(loss):
            raise NumericalError(
                "the loss is not finite", hint="the model overflows here: run it in float32"
            )
        return loss

    def _loss(self, batch: int) -> float:
        """A batch's part of the loss; keeps its gradient at what the last block returned."""
        targets = self._batches[batch][:, 1:].to(self._adapter.device)

        def score(logits: Tensor, part: slice) -> Tensor:
            return cross_entropy(logits, targets[:, part]).sum() / self.targets

        hidden, positions = self._entering[-1][batch], targets.shape[1]
        loss, gradient = head_gradient(
            self._adapter, self._source, hidden, score, positions=positions
        )
        self._entering[-1].release(batch)
        self._gradient[batch] = gradient
        return loss

    def backward(self, index: int, batch: int) -> None:
        """Add to the gradients of the loaded block; go on to those at what enters it."""
        hidden = self._entering[index][batch]
        arguments = self._arguments.arguments(index, hidden)
        block = self._adapter.blocks[index]
        with torch.enable_grad():
            entering = hidden.detach().float().requires_grad_()
            positional, named = _float32(arguments.positional), _float32(arguments.named)
            block(entering, *positional, **named).backward(self._gradient[batch])
        assert entering.grad is not None
        if not bool(torch.isfinite(entering.grad).all()):
            raise NumericalError(f"the gradient before block `{index}` is not finite")
        self._gradient[batch] = entering.grad
        self._entering[index].release(batch)


def _require_gradients(model: nn.Module) -> list[str]:
    """Make all parameters with data float32 and differentiable; their names.

    They are those of one block, and linears that it uses but another block has.
    """
    loaded = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
    for name in loaded:
        put_parameter(model, name, nn.Parameter(model.get_parameter(name).detach().float()))
    return loaded


def _float32(value: Any) -> Any:
    """The arguments of a block, masks and rotary tables, for a block in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(map(_float32, value))
    if isinstance(value, dict):
        return {name: _float32(inner) for name, inner in value.items()}
    return value


def _vocabulary(adapter: ModelAdapter) -> int:
    return int(adapter.config.get_text_config().vocab_size)
