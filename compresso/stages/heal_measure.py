"""What a checkpoint says of held-out text and of the probe, run block by block."""

from __future__ import annotations

from math import exp
from pathlib import Path

import torch
from torch import Tensor

from compresso.calibration.opening import open_adapter
from compresso.calibration.probe import probe_of
from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.divergence import cross_entropy
from compresso.runtime import Runtime, track

LOGITS_BYTES = 256 * 2**20


@torch.no_grad()
def measure(
    source: Checkpoint, batches: list[Tensor], runtime: Runtime, *, spill_dir: Path, title: str
) -> tuple[float, Fingerprint]:
    """The perplexity of the next token over some batches, (B, T) int64 each, and the probe.

    Computed in the type that the run computes the checkpoint in. Peak memory: one block, and the
    hidden states up to the memory budget.
    """
    adapter = open_adapter(source, runtime)
    vocabulary = adapter.config.get_text_config().vocab_size
    probe = probe_of(adapter.config)
    states = enter_blocks(
        adapter, source, batches, probe=probe, budget=runtime.max_memory, spill_dir=spill_dir
    )
    for _ in track(walk_blocks(adapter, source, states), adapter.count, title):
        pass
    total, count = 0.0, 0
    for number, batch in enumerate(batches):
        targets = batch[:, 1:].to(adapter.device)
        step = max(1, LOGITS_BYTES // (4 * vocabulary * len(batch)))
        for start in range(0, targets.shape[1], step):
            part = slice(start, min(start + step, targets.shape[1]))
            logits = adapter.logits(source, states[number][:, part])
            total += cross_entropy(logits, targets[:, part]).double().sum().item()
        count += targets.numel()
    assert states.probe is not None
    logits = adapter.logits(source, states.probe).cpu()
    adapter.unload_outside()
    return exp(total / count), Fingerprint(probe, logits)
