"""What healing writes: changed tensors among those of the source, or an adapter beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compresso.checkpoint.changed import ChangedCheckpoint
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import CheckpointError
from compresso.kernels.lowrank import LowRank
from compresso.models.adapter import ModelAdapter
from compresso.training.model import TrainingModel


@dataclass(frozen=True)
class Output:
    """What came of training, as it is stored.

    tensors: dense tensors that changed, by name in the checkpoint, in the types they are stored in.
    factors: corrections of linears, exact in the model's type; None if there is no adapter.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    factors: dict[str, LowRank] | None = None

    def changed(self, source: Checkpoint) -> ChangedCheckpoint:
        """The source with what changed, as a reader of the output finds it."""
        return ChangedCheckpoint(source, tensors=self.tensors, corrections=self.factors)


def of_corrections(model: TrainingModel, source: Checkpoint, *, merge: bool) -> Output:
    """What is stored of the corrections of a trained model: merged weights, or rounded factors."""
    if not merge:
        return Output(
            factors={
                path: LowRank(_rounded(found.up, source.dtype), _rounded(found.down, source.dtype))
                for path, found in model.low_ranks().items()
            }
        )
    transposed = model.adapter.family.transposed
    tensors: dict[str, Tensor] = {}
    for path, found in model.low_ranks().items():
        name = f"{path}.weight"
        stored = source.load([name])[name]
        product = found.product().cpu()
        merged = stored.float() + (product.T if transposed else product)
        tensors[name] = merged.to(stored.dtype).contiguous()
    return Output(tensors)


def write_output(
    adapter: ModelAdapter, source: Checkpoint, output: Output, target: CheckpointWriter
) -> int:
    """Commit every part that is not committed yet; prove that what was not trained is unchanged.

    Returns how many stored tensors are the same to the bit.

    Raises CheckpointError if one that should be is not: the disk then holds something else than was
    written to it.
    """
    unchanged = 0
    for part, names in enumerate(parts_of(source.names(), adapter.blocks_prefix, adapter.count)):
        if target.restore(part) is None:
            same = source.load(name for name in names if name not in output.tensors)
            own = {name: output.tensors[name] for name in names if name in output.tensors}
            target.commit(part, {**same, **own}, {})
        committed = target.restore(part)
        assert committed is not None
        frozen = [name for name in names if name not in output.tensors]
        for name, tensor in source.load(frozen).items():
            if not _same_bits(committed[0][name], tensor):
                raise CheckpointError(
                    f"`{name}` was not trained, but is written otherwise than in `{source.path}`",
                    hint="pass `--fresh` to start over",
                )
        unchanged += len(frozen)
    return unchanged


def parts_of(names: list[str], prefix: str, blocks: int) -> list[list[str]]:
    """The tensors of every block, and last those of none."""
    parts: list[list[str]] = [[] for _ in range(blocks + 1)]
    for name in names:
        number = name.removeprefix(prefix).partition(".")[0]
        inside = name.startswith(prefix) and number.isdecimal() and int(number) < blocks
        parts[int(number) if inside else blocks].append(name)
    return parts


def _rounded(factor: Tensor, dtype: torch.dtype) -> Tensor:
    return factor.to(dtype).float().cpu()


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)
