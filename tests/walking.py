"""What tests of the walk share: batches, and what the whole model makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.calibration.states import States, enter_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.models.adapter import ModelAdapter

RAM = 10**9
BATCHES = [tokens(3, 20, seed=1), tokens(3, 20, seed=2), tokens(2, 20, seed=3)]
PROBE = tokens(1, 12, seed=4)
STATES_BYTES = 3 * 3 * 20 * 64 * 4  # of three batches as large as the largest, d = 64


class Identity(nn.Module):
    """Stands in for a block that is dropped."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def start(
    source: Checkpoint,
    *,
    budget: int = RAM,
    spill_dir: Path | None = None,
    probe: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[ModelAdapter, States]:
    """An adapter, and `BATCHES` at its first block."""
    adapter = ModelAdapter.open(source, dtype=dtype, device=torch.device("cpu"))
    entered = enter_blocks(
        adapter, source, BATCHES, probe=probe, budget=budget, spill_dir=spill_dir
    )
    return adapter, entered


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def outputs(model: PreTrainedModel, path: str, batches: list[Tensor] = BATCHES) -> list[Tensor]:
    """What a module of the whole model returns for every batch."""
    kept: list[Tensor] = []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda _, __, output: kept.append(output))
    for batch in batches:
        model(batch, use_cache=False)
    handle.remove()
    return kept


@torch.no_grad()
def direct_gram(model: PreTrainedModel, path: str) -> Tensor:
    """The gram of a linear's input in the whole model, in float64."""
    rows: list[Tensor] = []
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    for batch in BATCHES:
        model(batch, use_cache=False)
    handle.remove()
    tokens_of_all = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows]).double()
    return tokens_of_all.T @ tokens_of_all / len(tokens_of_all)


def changed(weight: Tensor) -> Tensor:
    """Another weight, not far off: as quantization would make it."""
    step = weight.abs().max() / 4
    return (weight / step).round() * step


def real(adapter: ModelAdapter) -> list[str]:
    """Names of the parameters that hold data."""
    return [name for name, tensor in adapter.model.named_parameters() if not tensor.is_meta]
