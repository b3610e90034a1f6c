"""Open a checkpoint's model as a run asks for it."""

from __future__ import annotations

import torch

from compresso.checkpoint.reader import Checkpoint
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime


def open_adapter(
    source: Checkpoint, runtime: Runtime, *, dtype: torch.dtype | None = None
) -> ModelAdapter:
    """The model of `source`, without its weights, to be run where and in what the user said.

    dtype: the type if the user named none; else what is safe for the checkpoint here.

    Raises as `ModelAdapter.open` does.
    """
    return ModelAdapter.open(
        source,
        dtype=runtime.dtype or dtype or runtime.compute_dtype(source.dtype),
        device=runtime.device,
        trust_remote_code=runtime.trust_remote_code,
    )
