"""Scores of sub-blocks by their weights, in execution order: attention 0, MLP 0, ..."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from compresso.calibration.backward import walk_back
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.taylor import magnitude_importance, taylor_importance
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import halves
from compresso.runtime import Runtime, track


def taylor_scores(
    adapter: ModelAdapter,
    source: Checkpoint,
    batches: list[Tensor],
    *,
    runtime: Runtime,
    spill_dir: Path,
) -> list[float]:
    """First-order Taylor importance of every sub-block's linears; of a block, add both halves.

    batches: token ids, (B, T) int64 each, that the mean loss is taken over.

    Norms and biases do not count; a sub-block that the model lacks has no importance. Keeps what
    `walk_back` says, within `runtime.max_memory`; what is over it goes to files in `spill_dir`.
    Raises as `walk_back` does.
    """
    scores = [0.0] * (2 * adapter.count)
    walk = walk_back(adapter, source, batches, budget=runtime.max_memory, spill_dir=spill_dir)
    for block in track(walk, adapter.count, "measure gradients"):
        first = 2 * block.index
        scores[first : first + 2] = _halves(adapter, block.index, _taylor)
    return scores


def magnitude_scores(adapter: ModelAdapter, source: Checkpoint) -> list[float]:
    """Sum of |w| over every sub-block's linears; of a block, add both halves. Needs no data."""
    scores: list[float] = []
    for index in range(adapter.count):
        adapter.load_block(index, source)
        try:
            scores += _halves(adapter, index, magnitude_importance)
        finally:
            adapter.unload_block(index)
    return scores


def _taylor(weight: Tensor) -> float:
    assert weight.grad is not None
    return taylor_importance(weight.detach(), weight.grad)


def _halves(
    adapter: ModelAdapter, index: int, importance: Callable[[Tensor], float]
) -> list[float]:
    """The sums over the linears of attention and of the MLP, wherever they are; 0 without any."""
    scores = [0.0, 0.0]
    for mlp, half in enumerate(halves(adapter.family)):
        if not adapter.structure.lacks(2 * index + mlp):
            for path in half.linears:
                weight = adapter.blocks[index].get_submodule(path).weight
                assert isinstance(weight, Tensor)
                scores[mlp] += importance(weight)
    return scores
