"""How alike every two blocks are, for folding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.similarity import alignment, relative_distance
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime, track

TOKENS = 1024  # whose products are compared: (tokens, tokens) per block
SAMPLE = 2**16  # weights of every linear that are compared, evenly spread


@dataclass(frozen=True)
class Pairs:
    """Symmetric tables over blocks.

    alignment: linear CKA of what two blocks add to the residual stream, 0 to 1.
    distance:  of their weights, 0 if equal, 1 if unrelated.
    """

    alignment: list[list[float]]
    distance: list[list[float]]


def compare_blocks(
    adapter: ModelAdapter,
    source: Checkpoint,
    batches: list[Tensor],
    *,
    runtime: Runtime,
    spill_dir: Path,
) -> Pairs:
    """Compare every two blocks in one walk.

    batches: token ids, (B, T) int64 each; 1024 tokens, evenly spread, are compared. Of the
             weights, 65536 of every linear, at the same places in every block.

    Keeps those besides what a walk keeps. Raises as `enter_blocks` does.
    """
    states = enter_blocks(
        adapter, source, batches, probe=None, budget=runtime.max_memory, spill_dir=spill_dir
    )
    every = max(1, -(-states.tokens // TOKENS))
    grams, weights = [], []
    for block in track(walk_blocks(adapter, source, states), adapter.count, "compare blocks"):
        weights.append(_sample(adapter, block.module))
        added = []
        for parts in block.forward_with_parts():
            added.append((parts.output - parts.input).flatten(0, 1)[::every].float())
        rows = torch.cat(added)[:TOKENS]
        grams.append((rows @ rows.T).cpu())
    return Pairs(
        alignment=alignment(torch.stack(grams)).tolist(),
        distance=relative_distance(torch.stack(weights)).tolist(),
    )


def _sample(adapter: ModelAdapter, block: torch.nn.Module) -> Tensor:
    chosen = []
    for path in adapter.family.all_linears:
        flat = adapter.weight(block, path).flatten()
        chosen.append(flat[:: max(1, len(flat) // SAMPLE)].float().cpu())
    return torch.cat(chosen)
