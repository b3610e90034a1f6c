"""Whether a whole model fits the memory that is free."""

from __future__ import annotations

import torch

from compresso.checkpoint.reader import Checkpoint
from compresso.runtime import format_bytes, free_memory

WORKING_SHARE = 0.3  # what a model takes to run, besides its weights


def shortage(source: Checkpoint, device: torch.device) -> str | None:
    """Why a checkpoint cannot be loaded whole on a device, in words; None if it can.

    Packed weights are unpacked when they run, so a model needs its dense size.
    """
    needed = int((1 + WORKING_SHARE) * source.parameters * source.dtype.itemsize)
    free = free_memory()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    if needed <= free:
        return None
    return f"it needs about {format_bytes(needed)} and {format_bytes(free)} are free"
