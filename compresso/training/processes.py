"""Several processes that train one model, as `accelerate launch` starts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from compresso.runtime import free_memory, launched

# What is added up at once, of gradients.
BUCKET_BYTES = 64 * 2**20
# Others wait while the first prunes, quantizes or writes; the launcher ends them if it fails.
LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Processes:
    """Those that train together; one, if nobody started more.

    index: of this one. count: of all. sharded: parameters that are trained, and what the optimizer
    remembers of them, are split among them (FSDP), rather than held by each.
    """

    index: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.index == 0

    def batches(self, rows: Sequence[int], micro: int) -> list[tuple[list[int], float]]:
        """This process's share of some sequences, in runs of at most `micro`.

        Each run comes with its share of all sequences. All processes get as many runs; one that
        has none left gets a run that counts 0.
        """
        per = -(-len(rows) // self.count)
        own = rows[self.index * per : (self.index + 1) * per]
        runs = [list(own[start : start + micro]) for start in range(0, len(own), micro)]
        found = [(run, len(run) / len(rows)) for run in runs]
        return found + [([rows[0]], 0.0)] * (-(-per // micro) - len(runs))

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor, in place, by its sum over the processes."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            distributed.all_reduce(flat)
            for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Go on once all processes have come here."""
        if self.count > 1:
            distributed.barrier()

    def agree(self, flag: bool) -> bool:
        """What the first process says."""
        if self.count == 1:
            return flag
        said = torch.tensor([float(flag and self.first)])
        self.add_up([said])
        return bool(said)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process do something before the others do it."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def shard(self, blocks: Sequence[nn.Module], root: nn.Module) -> None:
        """Split parameters among the processes: those of a block together, and those of no block.

        A block's are whole only while it runs. Parameters become distributed tensors.
        """
        for module in (*blocks, root):
            fully_shard(module)

    def put_away(self, root: nn.Module) -> None:
        """After a run without a way back, let go of what is not this process's share."""
        if isinstance(root, FSDPModule):
            root.reshard()


ALONE = Processes()


def join(device: torch.device) -> Processes:
    """The processes that this one was started with; meets them if it has not yet."""
    found = launched()
    if found.count == 1:
        return ALONE
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=LONGEST_WAIT)
    return Processes(found.index, found.count, found.sharded)


@dataclass(frozen=True)
class Follower:
    """Stands for the `CheckpointWriter` in a process that takes part, but writes nothing."""

    target: Path

    @property
    def partial(self) -> Path:
        """Where the first process writes."""
        return self.target.with_name(f"{self.target.name}.partial")


def free_for_each(device: torch.device, count: int) -> int:
    """Bytes that each of `count` processes can still take: of its GPU, or of the RAM they share."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory() // count


def gathered(tensors: Iterable[tuple[str, Tensor]], *, first: bool) -> dict[str, Tensor]:
    """Tensors by name, put together where they are split; all processes have to ask.

    Only the first process gets them. Of those that are split one at a time is whole on a device:
    they wait on the CPU for the others. The rest are not copied.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        together = whole(tensor)
        if first:
            found[name] = together if together is tensor else together.cpu()
    return found


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be split among processes, put together; all of them have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A whole value on the device of a tensor, and split among the processes as that is."""
    placed = value.to(tensor.device, copy=True)
    if not isinstance(tensor, DTensor):
        return placed
    return distribute_tensor(placed, tensor.device_mesh, tensor.placements)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type that are not too large together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
