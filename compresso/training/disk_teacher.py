"""An original that is asked everything before training begins, a block at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from compresso.calibration.walk import LiveBlock, enter_blocks, walk_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.distillation import top_scores, unit_states
from compresso.models.adapter import ModelAdapter
from compresso.models.substitution import replaced
from compresso.runtime import Runtime, format_bytes, log, track
from compresso.training.lessons import (
    BLOCK,
    HIDDEN,
    SCORES,
    TOKENS,
    Lesson,
    StoredLessons,
    Wanted,
    from_hidden,
    from_top,
)

TOKENS_PER_BATCH = 2048
LOGITS_BYTES = 64 * 2**20  # of one copy
FLOAT32_BYTES = 4


class DiskTeacher:
    """A teacher that was asked everything before. Its files are durable once it was entered.

    nbytes: what they take on the disk, exactly.
    """

    place: Literal["disk", "resident"] = "disk"

    def __init__(
        self,
        adapter: ModelAdapter,
        original: Checkpoint,
        sequences: Tensor,
        wanted: Wanted,
        *,
        directory: Path,
        runtime: Runtime,
    ) -> None:
        """adapter: the original's model, without weights. Computes nothing yet.

        sequences: ids of all that there will be, (N, T) int64. directory: for what is kept.
        """
        self._adapter = adapter
        self._original = original
        self._batches = list(sequences.split(max(1, TOKENS_PER_BATCH // sequences.shape[1])))
        if wanted.top is not None:  # the last token has its place among the others
            wanted = replace(wanted, top=min(wanted.top, _vocabulary(adapter) - 1))
        self._wanted = wanted
        self._budget = runtime.max_memory
        self._stored = StoredLessons(
            directory / f"teacher-{_key(adapter, original, sequences, wanted)}",
            wanted,
            (sequences.shape[0], sequences.shape[1]),
            width=adapter.config.hidden_size,
            dtype=original.dtype if original.dtype.itemsize == 2 else torch.bfloat16,
        )
        self.nbytes = self._stored.nbytes

    @property
    def complete(self) -> bool:
        """Whether an earlier run has asked everything."""
        return self._stored.complete

    def clear(self) -> None:
        """Take away what a killed run had begun to write, which takes room until then."""
        self._stored.clear()

    def __enter__(self) -> Self:
        if not self.complete:
            log(f"teacher: {format_bytes(self.nbytes)} in `{self._stored.directory}`")
            self._stored.begin()
            self._ask()
            self._stored.finish()
        self._stored.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._stored.close()
        self._adapter.unload_outside()

    def lesson(self, tokens: Tensor, rows: Tensor) -> Lesson:
        """What the original says of the sequences of these numbers, (B,) int64."""
        wanted, stored, device = self._wanted, self._stored, self._adapter.device
        hidden = stored.read(HIDDEN, rows).to(device) if wanted.keeps_hidden else None
        blocks = {
            block: stored.read(BLOCK.format(block), rows).to(device) for block in wanted.blocks
        }
        divergence: Callable[[Tensor, slice], Tensor] | None = None
        if wanted.scores and wanted.top is not None:
            divergence = partial(from_top, stored.top(rows, device), wanted)
        elif wanted.scores:
            assert hidden is not None
            divergence = partial(from_hidden, hidden, self._scores, wanted)
        return Lesson(hidden, blocks, divergence)

    @torch.no_grad()
    def _ask(self) -> None:
        """Walk the original over all sequences, and write down what is wanted."""
        adapter, original, stored = self._adapter, self._original, self._stored
        states = enter_blocks(
            adapter,
            original,
            self._batches,
            probe=None,
            budget=self._budget,
            spill_dir=stored.directory.parent,
        )

        def keep(block: LiveBlock) -> None:
            if block.index in self._wanted.blocks:
                for batch, first in enumerate(self._firsts()):
                    stored.put(BLOCK.format(block.index), first, unit_states(states[batch]))

        walk = walk_blocks(adapter, original, states, after=keep)
        for _ in track(walk, adapter.count, "teacher"):
            pass
        for batch, first in enumerate(self._firsts()):
            hidden = adapter.head_input(original, states[batch])
            if self._wanted.keeps_hidden:
                stored.put(HIDDEN, first, hidden)
            if self._wanted.scores and self._wanted.top is not None:
                self._keep_top(first, hidden, self._wanted.top)
            states.release(batch)
        adapter.unload_outside()

    def _keep_top(self, first: int, hidden: Tensor, count: int) -> None:
        vocabulary = _vocabulary(self._adapter)
        step = max(1, LOGITS_BYTES // (FLOAT32_BYTES * vocabulary * len(hidden)))
        pieces = [
            top_scores(self._scores(piece), count, temperature=self._wanted.temperature)
            for piece in hidden.split(step, dim=1)
        ]
        self._stored.put(TOKENS, first, torch.cat([piece.tokens for piece in pieces], 1))
        scores = torch.cat([piece.log_probabilities for piece in pieces], 1)
        self._stored.put(SCORES, first, scores)

    def _scores(self, hidden: Tensor) -> Tensor:
        """What the head makes of what it reads, (B, t, d): (B, t, vocabulary) float32."""
        with replaced(self._adapter.model, {self._adapter.family.final_norm: nn.Identity()}):
            return self._adapter.logits(self._original, hidden)

    def _firsts(self) -> Iterator[int]:
        """The number of the first sequence of every batch."""
        first = 0
        for batch in self._batches:
            yield first
            first += len(batch)


def _key(adapter: ModelAdapter, original: Checkpoint, sequences: Tensor, wanted: Wanted) -> str:
    """A short hash of all that decides what the original says."""
    digest = hashlib.sha256(json.dumps(asdict(wanted)).encode())
    digest.update(f"{original.key} {adapter.dtype} {tuple(sequences.shape)}".encode())
    digest.update(sequences.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _vocabulary(adapter: ModelAdapter) -> int:
    return int(adapter.config.get_text_config().vocab_size)
