"""How much the inputs of every linear count: what llama.cpp calls an importance matrix."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.formats.gguf_families import Plan
from compresso.formats.gguf_tensors import Encoded
from compresso.formats.writing import Export
from compresso.models.adapter import ModelAdapter
from compresso.runtime import track


def mean_squares(export: Export, plan: Plan, encoded: Mapping[str, Encoded]) -> dict[str, Tensor]:
    """Of what every linear reads, (columns,) float32 by its name in the file: a gram's diagonal.

    encoded: all that is in the file.
    """
    assert export.calibration is not None
    source, runtime = export.own, export.runtime
    adapter = ModelAdapter.open(
        source,
        dtype=runtime.compute_dtype(source.dtype),
        device=runtime.device,
        trust_remote_code=runtime.trust_remote_code,
    )
    states = enter_blocks(
        adapter,
        source,
        export.calibration.batches,
        probe=None,
        budget=runtime.max_memory // 2,
        spill_dir=export.writer.partial,
    )
    named = _names_of_linears(adapter, plan)
    found: dict[str, Tensor] = {}
    for block in track(walk_blocks(adapter, source, states), adapter.count, "importance"):
        prefix = adapter.module_prefix(block.index)
        for paths in adapter.family.linears:
            names = [named[f"{prefix}{path}"] for path in paths if f"{prefix}{path}" in named]
            if not names or adapter.structure.lacks(2 * block.index + (paths[0][:4] == "mlp.")):
                continue
            squares = block.gram(paths).diagonal().cpu().clone()
            found |= dict.fromkeys(names, squares)
    for name, tensor in encoded.items():
        if len(tensor.shape) == 2 and name.startswith("blk.") and name not in found:
            found[name] = torch.ones(tensor.shape[1])  # zeros: nothing to weigh
    return found


def _names_of_linears(adapter: ModelAdapter, plan: Plan) -> dict[str, str]:
    """Path in transformers -> name in the file, of the linears of all blocks that are in it."""
    stored = {piece.stored: piece.name for piece in plan.pieces if piece.stored is not None}
    places = {block: place for place, block in enumerate(plan.blocks)}
    found = {}
    for block, place in places.items():
        prefix = adapter.block_prefix(block)
        for path in adapter.family.all_linears:
            name = stored.get(f"{prefix}{path}.weight")
            if name is not None:
                assert name.startswith(f"blk.{place}.")
                found[f"{adapter.module_prefix(block)}{path}"] = name
    return found
