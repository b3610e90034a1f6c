"""Structures of every kind, their checkpoints, and what stock models say of them.

The reference needs none of our modules: a stock model in which hooks silence what is removed,
weights are copied where they are shared, and corrections are added to weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import BLOCKS, build
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresso.checkpoint.reader import Checkpoint
from compresso.families import Family, family_of
from compresso.models.structure import Structure, removed_tensors, restructure

STRUCTURES = {
    "first attention": Structure(no_attention=(0,)),
    "last mlp": Structure(no_mlp=(BLOCKS - 1,)),
    "both kinds": Structure(no_attention=(0, 3), no_mlp=(2, 3, 5)),
    "shared": Structure(shared=(0, 0, 2, 3, 3, 3)),
    "corrected": Structure(rank=3, corrected=(1, 4)),
    "everything": Structure(
        no_attention=(1, 5), no_mlp=(2,), shared=(0, 0, 0, 3, 4, 4), rank=2, corrected=(0, 1, 3)
    ),
}


def linears(family: Family) -> list[str]:
    """Paths of all linears of a block."""
    return [path for group in family.linears for path in group]


def used_linears(family: Family, structure: Structure, block: int) -> list[str]:
    """Paths of the linears that a block of a structure runs."""
    attention = [*family.linears[0], *family.linears[1]]
    mlp = [*family.linears[2], *family.linears[3]]
    return [
        *(attention if block not in structure.no_attention else []),
        *(mlp if block not in structure.no_mlp else []),
    ]


def corrections(model: PreTrainedModel, family: Family, structure: Structure) -> dict[str, Tensor]:
    """Random corrections, always the same, by name in the checkpoint."""
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Tensor] = {}
    for block in structure.corrected:
        for path in used_linears(family, structure, block):
            name = f"{family.blocks}.{block}.{path}"
            shape = model.get_parameter(f"{name}.weight").shape
            rows, columns = reversed(shape) if family.transposed else shape
            down = torch.randn(structure.rank, columns, generator=generator) / columns**0.5
            found[f"{name}.correction_down.weight"] = down
            found[f"{name}.correction_up.weight"] = torch.randn(
                rows, structure.rank, generator=generator
            )
            if f"{name}.bias" in dict(model.named_parameters()):
                bias = torch.randn(rows, generator=generator) / 10
                found[f"{name}.correction_up.bias"] = bias
    return found


def save(model: PreTrainedModel, structure: Structure, path: Path) -> Checkpoint:
    """The checkpoint of a stock model, restructured; without the code that goes with it."""
    family = family_of(model.config.model_type)
    path.mkdir(parents=True)
    config = restructure(model.config.to_diff_dict(), structure)
    (path / "config.json").write_text(json.dumps(config, default=str))
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name in {*model.all_tied_weights_keys} | removed_tensors(
        state, family, structure, prefix=f"{family.blocks}."
    ):
        state.pop(name, None)
    state |= corrections(model, family, structure)
    for module, old in family.old_names:  # which is how transformers saves them, too
        state[f"{old}.weight"] = state.pop(f"{module}.weight")
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(path)


@torch.no_grad()
def reference(name: str, structure: Structure, **changes: Any) -> PreTrainedModel:
    """A stock model of a family that computes what the restructured one is to compute."""
    model = build(name, **changes)
    family = family_of(name)
    blocks = list(model.get_submodule(family.blocks))
    factors = corrections(model, family, structure)
    for index, block in enumerate(blocks):
        for path in linears(family):
            linear = block.get_submodule(path)
            linear.load_state_dict(blocks[structure.owner(index)].get_submodule(path).state_dict())
    for index, block in enumerate(blocks):
        for path in linears(family):
            prefix = f"{family.blocks}.{index}.{path}"
            if (up := factors.get(f"{prefix}.correction_up.weight")) is not None:
                change = up @ factors[f"{prefix}.correction_down.weight"]
                weight = block.get_parameter(f"{path}.weight")
                weight += change.T if family.transposed else change
            if (bias := factors.get(f"{prefix}.correction_up.bias")) is not None:
                block.get_parameter(f"{path}.bias").add_(bias)
        if index in structure.no_attention:
            block.get_submodule(family.attention_output).register_forward_hook(_silence)
        if index in structure.no_mlp:
            block.get_submodule(family.mlp_output).register_forward_hook(_silence)
    return model


def _silence(_: nn.Module, __: object, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def scalars(model: nn.Module) -> int:
    """How many parameters a model has, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
