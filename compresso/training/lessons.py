"""What an original says of sequences, kept in memory-mapped files."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from compresso.errors import ResourceError
from compresso.kernels.distillation import (
    TopScores,
    softened_divergence,
    top_divergence,
    top_scores,
)

HIDDEN, TOKENS, SCORES = "hidden", "tokens", "scores"
BLOCK = "block-{}"
TEMPORARY = ".tmp"


@dataclass(frozen=True)
class Wanted:
    """What a model in training is to be shown of the original.

    hidden:      what the head reads.
    blocks:      what these blocks return, every state scaled to a root mean square of 1.
    scores:      how likely every next token is.
    top:         tokens that scores are kept of, the most likely ones; None for all, which takes
                 what the head reads, and its product each time.
    temperature: that scores are divided by.
    """

    hidden: bool = False
    blocks: tuple[int, ...] = ()
    scores: bool = False
    top: int | None = None
    temperature: float = 1.0

    @property
    def keeps_hidden(self) -> bool:
        """Whether what the head reads is needed for any of it."""
        return self.hidden or (self.scores and self.top is None)


@dataclass(frozen=True)
class Lesson:
    """What the original says of some sequences; only what is wanted of it.

    hidden:     what the head reads, (B, T, d).
    blocks:     what blocks return, (B, T, d), every state with a root mean square of 1, by block.
    divergence: given logits of some positions, (B, t, vocabulary), and which these are, the
                divergence from the original's, (B, t) float32, times the temperature's square.
    """

    hidden: Tensor | None = None
    blocks: Mapping[int, Tensor] = field(default_factory=dict)
    divergence: Callable[[Tensor, slice], Tensor] | None = None


@dataclass(frozen=True)
class _Kind:
    width: int
    dtype: torch.dtype


class StoredLessons:
    """Numbers by token in memory-mapped files of one directory: an array for each thing wanted.

    nbytes: of all files, which are on the disk as long as the directory is.
    """

    def __init__(
        self,
        directory: Path,
        wanted: Wanted,
        shape: tuple[int, int],
        *,
        width: int,
        dtype: torch.dtype,
    ) -> None:
        """Maps nothing yet. shape: sequences and tokens of each. width: d. dtype: of states."""
        kinds: dict[str, _Kind] = {}
        if wanted.keeps_hidden:
            kinds[HIDDEN] = _Kind(width, dtype)
        for block in wanted.blocks:
            kinds[BLOCK.format(block)] = _Kind(width, dtype)
        if wanted.scores and wanted.top is not None:
            kinds[TOKENS] = _Kind(wanted.top, torch.int32)
            kinds[SCORES] = _Kind(wanted.top + 1, torch.float16)
        self._kinds = kinds
        self._shape = shape
        self.directory = directory
        self._arrays: dict[str, Tensor] = {}
        self.nbytes = sum(prod(shape) * kind.width * kind.dtype.itemsize for kind in kinds.values())

    @property
    def complete(self) -> bool:
        """Whether all of it was written, here or by an earlier run."""
        return self.directory.is_dir()

    def clear(self) -> None:
        """Take away what a killed run had begun."""
        shutil.rmtree(self._unfinished, ignore_errors=True)

    def begin(self) -> None:
        """Take the room that all of it needs, and map it to be written.

        Raises ResourceError if the disk lacks it or cannot be written to.
        """
        new = self._unfinished
        try:
            self.clear()
            new.mkdir(parents=True)
            for name, kind in self._kinds.items():
                with (new / name).open("wb") as file:
                    size = prod(self._shape) * kind.width * kind.dtype.itemsize
                    file.truncate(size)
                    if hasattr(os, "posix_fallocate"):
                        # A disk that runs full while a map is written to kills the process.
                        os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            self.clear()
            raise ResourceError(
                f"cannot keep {self.nbytes / 1e9:.2f} GB of what the original says in"
                f" `{new.parent}`: {error.strerror}",
                hint="free disk space, use fewer samples, or pass `--teacher resident`",
            ) from None
        self._map(new)

    def put(self, name: str, first: int, values: Tensor) -> None:
        """Write what was found for the sequences from `first` on, (B, T, width)."""
        self._arrays[name][first : first + len(values)].copy_(values)

    def finish(self) -> None:
        """Make all of it durable; it counts as complete from now on. Raises ResourceError."""
        new = self._unfinished
        try:
            for name in self._kinds:
                with (new / name).open("r+b") as file:
                    os.fsync(file.fileno())
            new.replace(self.directory)
        except OSError as error:
            raise ResourceError(f"cannot write `{new}`: {error.strerror}") from error

    def open(self) -> None:
        """Map what is complete, to be read."""
        self._map(self.directory)

    def close(self) -> None:
        """Let go of the files, which stay."""
        self._arrays = {}

    def read(self, name: str, rows: Tensor) -> Tensor:
        """What was written for these sequences, (B, T, width). rows: (B,) int64."""
        return self._arrays[name].index_select(0, rows.cpu())

    def top(self, rows: Tensor, device: torch.device) -> TopScores:
        """The kept scores of these sequences, (B, T, ...)."""
        values = self.read(SCORES, rows).to(device, torch.float32)
        # They were rounded: together they are to be 1 again.
        return TopScores(self.read(TOKENS, rows).to(device).long(), values.log_softmax(-1))

    @property
    def _unfinished(self) -> Path:
        return self.directory.with_name(self.directory.name + TEMPORARY)

    def _map(self, directory: Path) -> None:
        for name, kind in self._kinds.items():
            with (directory / name).open("r+b") as file:
                flat = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=kind.dtype)
            self._arrays[name] = flat.view(*self._shape, kind.width)


def from_hidden(
    hidden: Tensor, scores: Callable[[Tensor], Tensor], wanted: Wanted, logits: Tensor, part: slice
) -> Tensor:
    """A `Lesson`'s divergence from what the head makes of states: as far as is wanted of it.

    hidden: what the head reads, (B, T, d). scores: what it makes of that, (B, t, vocabulary).
    """
    with torch.no_grad():
        expected = scores(hidden[:, part])
        if wanted.top is not None:
            top = top_scores(expected, wanted.top, temperature=wanted.temperature)
    if wanted.top is None:
        return softened_divergence(expected, logits, temperature=wanted.temperature)
    return top_divergence(top, logits, temperature=wanted.temperature)


def from_top(top: TopScores, wanted: Wanted, logits: Tensor, part: slice) -> Tensor:
    """A `Lesson`'s divergence from the kept scores of all positions."""
    known = TopScores(top.tokens[:, part], top.log_probabilities[:, part])
    return top_divergence(known, logits, temperature=wanted.temperature)
