"""The hidden states of all calibration tokens between two blocks, in RAM or on disk."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ResourceError
from compresso.models.adapter import BlockArguments, ModelAdapter


class Store:
    """One tensor per batch, replaced in place; in RAM, or in a memory map of an unnamed file."""

    def __init__(
        self, batches: int, *, batch_bytes: int, device: torch.device, spill_dir: Path | None
    ) -> None:
        """Make room for `batches` tensors of up to `batch_bytes` each.

        device:    where tensors are handed out.
        spill_dir: keep them in a file there, which vanishes with the store; None for RAM.

        Raises ResourceError if the disk has no room or cannot be written to.
        """
        self.batch_bytes = batch_bytes
        granularity = mmap.ALLOCATIONGRANULARITY
        self._slot = -(-batch_bytes // granularity) * granularity
        self._device = device
        self._tensors: list[Tensor | None] = [None] * batches
        size = batches * self._slot
        self._file = None if spill_dir is None or not size else _map_file(size, spill_dir)
        # One piece of memory for all, as thousands of pieces among those that come and go with
        # every batch would leave holes that are never used again.
        self._memory = (
            torch.empty(size, dtype=torch.uint8)
            if self._file is None
            else torch.frombuffer(self._file, dtype=torch.uint8)
        )
        self.ram_bytes = size if spill_dir is None else 0

    def __getitem__(self, batch: int) -> Tensor:
        """The tensor of that batch, not to be changed, on the device; until it is replaced."""
        held = self._tensors[batch]
        assert held is not None, f"batch {batch} was not stored"
        return held.to(self._device)

    def __setitem__(self, batch: int, tensor: Tensor) -> None:
        """Keep a copy in place of what that batch had, of any shape and type that fits."""
        assert tensor.nbytes <= self._slot
        start = batch * self._slot
        held = self._memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        self._tensors[batch] = held.copy_(tensor)
        self.release(batch)

    def release(self, batch: int) -> None:
        """Let the system take back the memory of a batch that is on disk. Loses nothing."""
        if self._file is not None:
            self._file.madvise(mmap.MADV_DONTNEED, batch * self._slot, self._slot)


class States:
    """What flows between blocks: hidden states, a probe, and each block's other arguments.

    batches: how many there are. tokens: in all of them. width: d.
    probe:   hidden states of a few tokens, (1, P, d), that every block is applied to but that are
             part of no statistic; or None.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        shapes: Sequence[tuple[int, int]],
        *,
        budget: int,
        spill_dir: Path | None,
    ) -> None:
        """shapes: of the token batches, (B, T) each. Use `enter_blocks`."""
        self.batches = len(shapes)
        self.tokens = sum(map(prod, shapes))
        self.width: int = adapter.config.hidden_size
        self.probe: Tensor | None = None
        self._adapter = adapter
        self._largest = max(map(prod, shapes), default=0)
        self._budget = budget
        self._spill_dir = spill_dir
        self._arguments: dict[tuple[int, ...], list[BlockArguments]] = {}
        self._hidden = self._needed_store(self.width, beside=0)
        self._for_attention: Store | None = None
        self._for_mlp: Store | None = None

    def __getitem__(self, batch: int) -> Tensor:
        """The hidden states of a batch, (B, T, d), not to be changed, on the adapter's device."""
        return self._hidden[batch]

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        self._hidden[batch] = hidden

    @property
    def hidden(self) -> Store:
        """Where the hidden states are kept."""
        return self._hidden

    def release(self, batch: int) -> None:
        """Say that a batch is not needed for now, so that its memory can be used for others."""
        self._hidden.release(batch)

    def enter(self, source: Checkpoint, tokens: Tensor) -> Tensor:
        """Run tokens, (B, T) int64, up to block 0; remember every block's other arguments."""
        hidden, arguments = self._adapter.enter(source, tokens)
        self._arguments.setdefault(tuple(tokens.shape), arguments)
        return hidden

    def arguments(self, block: int, hidden: Tensor) -> BlockArguments:
        """What the model passes to a block besides `hidden`, which is (B, T, d)."""
        return self._arguments[tuple(hidden.shape[:2])][block]

    def attention_store(self, width: int) -> Store:
        """Room for `width` more numbers per token, on disk if the budget is used up.

        Every block gets the same room, and what an earlier one had there is lost.
        """
        if (
            self._for_attention is None
            or self._batch_bytes(width) > self._for_attention.batch_bytes
        ):
            self._for_attention = None  # before new room is made
            self._for_attention = self._needed_store(width, beside=self._hidden.ram_bytes)
        return self._for_attention

    def mlp_store(self, width: int) -> Store | None:
        """Likewise beside what `attention_store` gave, but None if the budget is used up."""
        if self._for_mlp is None or self._batch_bytes(width) > self._for_mlp.batch_bytes:
            taken = 0 if self._for_attention is None else self._for_attention.ram_bytes
            self._for_mlp = None
            self._for_mlp = self._ram_store(width, beside=self._hidden.ram_bytes + taken)
        return self._for_mlp

    def further_store(self, each: int) -> Store:
        """Room for `each` more tensors per batch, as large as its hidden states, or on disk."""
        return self._needed_store(self.width, beside=self._hidden.ram_bytes, each=each)

    def _needed_store(self, width: int, *, beside: int, each: int = 1) -> Store:
        found = self._ram_store(width, beside=beside, each=each)
        if found is not None:
            return found
        if self._spill_dir is None:
            needed = each * self.batches * self._batch_bytes(width) + beside
            raise ResourceError(
                f"hidden states need {needed / 1e9:.2f} GB, but `max_memory` is "
                f"{self._budget / 1e9:.2f} GB",
                hint="allow more memory or use fewer samples",
            )
        return self._new_store(width, self._spill_dir, each=each)

    def _ram_store(self, width: int, *, beside: int, each: int = 1) -> Store | None:
        if each * self.batches * self._batch_bytes(width) + beside > self._budget:
            return None
        return self._new_store(width, None, each=each)

    def _new_store(self, width: int, spill_dir: Path | None, *, each: int) -> Store:
        return Store(
            each * self.batches,
            batch_bytes=self._batch_bytes(width),
            device=self._adapter.device,
            spill_dir=spill_dir,
        )

    def _batch_bytes(self, width: int) -> int:
        return self._largest * width * self._adapter.dtype.itemsize


def enter_blocks(
    adapter: ModelAdapter,
    source: Checkpoint,
    batches: list[Tensor],
    *,
    probe: Tensor | None,
    budget: int,
    spill_dir: Path | None,
) -> States:
    """The hidden states entering block 0. Frees the embeddings when done.

    batches:   token ids, (B, T) int64 each.
    probe:     token ids, (1, P) int64.
    budget:    bytes of hidden states to hold in RAM.
    spill_dir: where more of them go.

    Raises ResourceError if they fit neither.
    """
    shapes = [(batch.shape[0], batch.shape[1]) for batch in batches]
    states = States(adapter, shapes, budget=budget, spill_dir=spill_dir)
    for index, batch in enumerate(batches):
        states[index] = states.enter(source, batch)
    if probe is not None:
        states.probe = states.enter(source, probe)
    adapter.unload_outside()
    return states


def _map_file(size: int, directory: Path) -> mmap.mmap:
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                # A disk that runs full while a map is written to kills the process.
                os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise ResourceError(
            f"cannot keep {size / 1e9:.2f} GB of hidden states in `{directory}`: {error.strerror}",
            hint="free disk space, or allow more memory",
        ) from None
