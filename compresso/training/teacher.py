"""The original model, which tells a model in training what it says of the same sequences."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

from compresso.calibration.opening import open_adapter
from compresso.checkpoint.kept import KeptState
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ResourceError
from compresso.kernels.distillation import unit_states
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime, format_bytes, launched, log
from compresso.training.disk_teacher import DiskTeacher
from compresso.training.lessons import Lesson, Wanted, from_hidden
from compresso.training.model import TrainingModel
from compresso.training.processes import free_for_each
from compresso.training.returned import returned_by

__all__ = ["DiskTeacher", "Lesson", "ResidentTeacher", "Teacher", "Wanted", "open_teacher"]

SPARE = 1.2  # what a model in memory takes beside its weights
CHOICE = "teacher"  # what the place that was chosen is kept as

Place = Literal["auto", "disk", "resident"]


class Teacher(Protocol):
    """Says what the original says. A context: leaving it frees the memory.

    place: where it has that from.
    """

    place: Literal["disk", "resident"]

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def lesson(self, tokens: Tensor, rows: Tensor) -> Lesson:
        """What the original says of some sequences.

        tokens: ids, (B, T) int64. rows: (B,) int64, their numbers among all sequences.
        """
        ...


@dataclass(frozen=True)
class Beside:
    """Bytes that training takes beside its teacher. memory: of a process. disk: yet to write."""

    memory: int = 0
    disk: int = 0


NOTHING = Beside()


def open_teacher(
    original: Checkpoint,
    sequences: Tensor,
    wanted: Wanted,
    *,
    place: Place,
    directory: Path,
    runtime: Runtime,
    beside: Beside = NOTHING,
) -> DiskTeacher | ResidentTeacher:
    """The original as a teacher; entering it computes what it is to say, if it must.

    sequences: ids of all that there will be, (N, T) int64.
    place:     "disk" runs the original once, a block at a time, and keeps what it says of all
               sequences in `directory`, for later runs as well; "resident" keeps the original in
               memory and runs it anew each time. "auto" takes the disk where there is room for
               it, as it costs the least memory, and time from the second reading on. What it took
               is kept in `directory`: a run that goes on takes the same. Both places say the same,
               to rounding.
    beside:    what else has to fit.

    Of several processes the first decides; it has to have been here before the others come.

    Raises ResourceError, naming what is needed, if there is no room.
    """
    adapter = open_adapter(original, runtime)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot write `{directory}`: {error.strerror}") from error
    stored = DiskTeacher(adapter, original, sequences, wanted, directory=directory, runtime=runtime)
    kept, first = KeptState(directory), launched().index == 0
    if first:
        stored.clear()
    chosen = place
    if place == "auto":
        before = kept.values(CHOICE)
        chosen = before["place"] if before else _place(stored, directory, beside)
    if first:
        if chosen == "disk":
            _check_disk(stored, directory, beside)
        else:
            _check_memory(adapter, original, stored, runtime, beside, automatic=place == "auto")
        if place == "auto":
            kept.keep(CHOICE, {}, {"place": chosen})
            log(f"teacher: {'asked once, kept on disk' if chosen == 'disk' else 'in memory'}")
    return stored if chosen == "disk" else ResidentTeacher(adapter, original, wanted)


class ResidentTeacher:
    """A teacher whose weights are all in memory, and that is run each time it is asked."""

    place: Literal["disk", "resident"] = "resident"

    def __init__(self, adapter: ModelAdapter, original: Checkpoint, wanted: Wanted) -> None:
        """adapter: the original's model. Loads nothing yet."""
        self._model = TrainingModel(adapter, original)
        self._wanted = wanted

    def __enter__(self) -> Self:
        self._model.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._model.__exit__()

    @torch.no_grad()
    def lesson(self, tokens: Tensor, rows: Tensor) -> Lesson:
        """What the original says of these ids, (B, T) int64; their numbers do not matter."""
        wanted = self._wanted
        with returned_by(self._model, wanted.blocks) as returned:
            hidden = self._model.hidden(tokens)
        blocks = {block: unit_states(states) for block, states in returned.items()}
        divergence = None
        if wanted.scores:
            divergence = partial(from_hidden, hidden, self._model.logits, wanted)
        return Lesson(hidden, blocks, divergence)


def _place(stored: DiskTeacher, directory: Path, beside: Beside) -> Place:
    """Where a teacher has to be that may be anywhere."""
    return "disk" if _fits(stored, shutil.disk_usage(directory).free, beside) else "resident"


def _fits(stored: DiskTeacher, free: int, beside: Beside) -> bool:
    return stored.complete or stored.nbytes + beside.disk <= free


def _check_disk(stored: DiskTeacher, directory: Path, beside: Beside) -> None:
    free = shutil.disk_usage(directory).free
    if not _fits(stored, free, beside):
        further = f", and training {format_bytes(beside.disk)}" if beside.disk else ""
        raise ResourceError(
            f"what the original says takes {format_bytes(stored.nbytes)}{further}, but"
            f" `{directory}` has {format_bytes(free)} free",
            hint="use fewer samples, another disk, or `--teacher resident`",
        )


def _check_memory(
    adapter: ModelAdapter,
    original: Checkpoint,
    stored: DiskTeacher,
    runtime: Runtime,
    beside: Beside,
    *,
    automatic: bool,
) -> None:
    """Raises ResourceError if the original does not fit beside the model in training."""
    needed = int(SPARE * original.parameters * adapter.dtype.itemsize)
    free = free_for_each(runtime.device, launched().count)
    if needed + beside.memory > free:
        tried = f", or {format_bytes(stored.nbytes)} of disk" if automatic else ""
        further = f", and training {format_bytes(beside.memory)} more" if beside.memory else ""
        raise ResourceError(
            f"the original takes {format_bytes(needed)} of memory{tried}{further}, but"
            f" {format_bytes(free)} are free",
            hint="use fewer samples and `--teacher disk`"
            + (", or `--checkpointing on`" if beside.memory else ""),
        )
