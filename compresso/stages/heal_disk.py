"""What training takes on the disk, checked before it begins."""

from __future__ import annotations

import shutil

from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import PARTS, WORK, CheckpointWriter
from compresso.errors import ResourceError
from compresso.runtime import format_bytes
from compresso.stages.heal_choice import Trained
from compresso.stages.heal_memory import corrections
from compresso.training.processes import Follower

# Bytes that the kept state holds: of every trained weight itself and its best state, and of one
# that moves two moments, in float32.
KEPT_BYTES = 8
MOMENTS_BYTES = 8


def disk_left(
    source: Checkpoint, trained: Trained, rank: int, target: CheckpointWriter | Follower
) -> int:
    """Bytes that training and its result are still to take on the disk of `target`.

    A new state is written beside the one before it, which goes then; the parts of the result come
    when training is done. What an unfinished run left is taken off.
    """
    low = corrections(source, trained, rank)
    state = KEPT_BYTES * (trained.parameters(source) + low)
    state += MOMENTS_BYTES * (trained.at_once(source) + low)
    result = source.stored_bytes + source.dtype.itemsize * low
    there = [*target.partial.glob(PARTS), *(target.partial / WORK).glob("training.safetensors")]
    held = sum(path.stat().st_size for path in there)
    return max(0, max(2 * state, state + result) - held)


def check_disk(needed: int, target: CheckpointWriter, *, instead: str) -> None:
    """Raises ResourceError, naming what is needed, if the disk of `target` lacks that.

    instead: what takes less.
    """
    free = shutil.disk_usage(target.partial).free
    if needed > free:
        raise ResourceError(
            f"training and what comes of it take about {format_bytes(needed)} on the disk, but"
            f" `{target.partial}` has {format_bytes(free)} free",
            hint=f"choose another disk with `-o`, or {instead}",
        )
