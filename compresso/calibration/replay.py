"""Run a published checkpoint block by block, for a proof that fits any memory."""

from __future__ import annotations

import torch
from torch import Tensor

from compresso.calibration.opening import open_adapter
from compresso.calibration.probe import probe_of
from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.divergence import divergence
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime


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


def fingerprint_of(source: Checkpoint, runtime: Runtime) -> Fingerprint:
    """What a checkpoint says of the probe tokens, run as the user asked."""
    tokens = probe_of(open_adapter(source, runtime).config)
    dtype = runtime.compute_dtype(source.dtype)
    logits = replay(
        source,
        tokens,
        dtype=dtype,
        device=runtime.device,
        trust_remote_code=runtime.trust_remote_code,
    )
    return Fingerprint(tokens, logits, dtype)


def distance(model: Fingerprint, other: Fingerprint) -> dict[str, float]:
    """How far another model is from one on the same tokens: mean KL in nats, same top token."""
    same = model.logits.argmax(-1) == other.logits.argmax(-1)
    return {
        "kl_to_model": float(divergence(model.logits, other.logits).mean()),
        "same_top_token_as_model": float(same.float().mean()),
    }
