"""What stages that train a whole model have in common."""

from __future__ import annotations

import torch

from compresso.calibration.data import Calibration
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import CheckpointError, ConfigError
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime


def training_dtype(source: Checkpoint, runtime: Runtime) -> torch.dtype:
    """What a model is trained in: what it is run in, unless gradients do not fit that.

    Raises ConfigError if the user asks for float16.
    """
    found = runtime.compute_dtype(source.dtype)
    if found != torch.float16:
        return found
    if runtime.dtype == torch.float16:
        raise ConfigError(
            "gradients do not fit float16", hint="pass `--dtype bfloat16` or `--dtype float32`"
        )
    return torch.bfloat16


def check_next_token(calibration: Calibration) -> None:
    """Raises CheckpointError if the sequences are so short that nothing follows in them."""
    length = calibration.record["length"]
    if length < 2:
        raise CheckpointError(
            f"`{calibration.record['dataset']}`: sequences of {length} token have no next one",
            hint="pass a larger `--seqlen`",
        )


def own_linears(adapter: ModelAdapter) -> list[str]:
    """The linears of all blocks by path in the checkpoint, shared ones once, in order."""
    found: list[str] = []
    for index in range(adapter.count):
        if adapter.structure.owner(index) != index:
            continue
        for group, paths in enumerate(adapter.family.linears):
            if not adapter.structure.lacks(2 * index + (group >= 2)):
                found += [f"{adapter.block_prefix(index)}{path}" for path in paths]
    return found
