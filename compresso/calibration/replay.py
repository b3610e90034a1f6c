"""Run a published checkpoint block by block, for a proof that fits any memory."""

from __future__ import annotations

import torch
from torch import Tensor

from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.models.adapter import ModelAdapter


@torch.no_grad()
def replay(
    source: Checkpoint,
    tokens: Tensor,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
) -> Tensor:
    """What the checkpoint says of some tokens, (1, T, vocabulary) float32.

    tokens: ids, (1, T) int64.

    Reads config.json and the stored tensors alone. Raises CheckpointError if they disagree.
    """
    adapter = ModelAdapter.open(
        source, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    states = enter_blocks(adapter, source, [], probe=tokens, budget=0, spill_dir=None)
    for _ in walk_blocks(adapter, source, states):
        pass
    assert states.probe is not None
    return adapter.logits(source, states.probe).cpu()
