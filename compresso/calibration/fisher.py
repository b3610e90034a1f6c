"""How much the loss depends on the rows and columns of every linear: one pass of gradients."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from compresso.calibration.backward import walk_back
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.decomposition import Fisher
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import halves
from compresso.runtime import Runtime, track


def measure_fisher(
    adapter: ModelAdapter,
    source: Checkpoint,
    batches: list[Tensor],
    *,
    runtime: Runtime,
    spill_dir: Path,
) -> dict[str, Fisher]:
    """The diagonal Fisher matrix of every linear, by rows and columns.

    batches: token ids, (B, T) int64 each. The loss is the mean over them of that of the next token.

    Keyed by the linear's name in the checkpoint; of one that several blocks use, it is the sum over
    these. Gradients are those of single sequences: of all sequences at once, most of a mean would
    cancel. Only one block's gradient of one sequence is ever held, beside what `walk_back` keeps.

    Raises as `walk_back` does.

    Source: Guo et al., arXiv:2311.12023, section 3.2. It squares the gradients of whole matrices
    and takes the means of their rows and columns last, which is the same.
    """
    sequences = [sequence for batch in batches for sequence in batch.split(1)]
    paths = {id(block): _linears(adapter, index) for index, block in enumerate(adapter.blocks)}
    sums: dict[str, tuple[Tensor, Tensor]] = {}

    def square(_: int, block: nn.Module) -> None:
        for path, name in paths[id(block)].items():
            weight = block.get_submodule(path).weight
            assert isinstance(weight, Tensor) and weight.grad is not None
            gradient = weight.grad.T if adapter.family.transposed else weight.grad
            squares = (gradient * len(sequences)).square_()
            means = squares.mean(1), squares.mean(0)
            if name in sums:
                means = sums[name][0] + means[0], sums[name][1] + means[1]
            sums[name] = means
            weight.grad = None

    walk = walk_back(
        adapter,
        source,
        sequences,
        budget=runtime.max_memory,
        spill_dir=spill_dir,
        after_batch=square,
    )
    for _ in track(walk, adapter.count, "measure gradients"):
        pass
    return {
        name: Fisher(*((one / len(sequences)).sqrt() for one in means))
        for name, means in sums.items()
    }


def _linears(adapter: ModelAdapter, index: int) -> dict[str, str]:
    """Of the linears that a block uses: path in the block -> name in the checkpoint."""
    owner = adapter.block_prefix(adapter.structure.owner(index))
    return {
        path: f"{owner}{path}"
        for mlp, half in enumerate(halves(adapter.family))
        if not adapter.structure.lacks(2 * index + mlp)
        for path in half.linears
    }
