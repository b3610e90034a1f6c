"""The weights of a model that a format may store as codes, and the codes that they have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compresso.checkpoint.layout import Scheme
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.grid import Grid, Packed
from compresso.kernels.hqq import AffineCodes
from compresso.kernels.normal_float import FRACTION, IntegerCodes
from compresso.models.adapter import ModelAdapter
from compresso.models.names import linear_modules


@dataclass(frozen=True)
class Matrix:
    """A weight that a format may store as codes.

    path:   in the checkpoint that is exported. module: in transformers.
    block:  its block, or None for head and embedding. part: which of the three it is.
    rows, columns: of the weight as (out, in), whichever way round it is stored.
    """

    path: str
    module: str
    block: int | None
    part: Literal["linear", "head", "embedding"]
    rows: int
    columns: int

    @property
    def name(self) -> str:
        """Of its dense weight."""
        return f"{self.path}.weight"


def matrices(model: Checkpoint, adapter: ModelAdapter) -> list[Matrix]:
    """All linears of a model, in execution order, then its embedding, and its head if not tied.

    model: one of those of an export. adapter: its architecture.
    """
    modules = linear_modules(adapter.model, adapter.family, model)
    embedding = adapter.stored[f"{adapter.family.embedding}.weight"].removesuffix(".weight")
    found = []
    order = [n for index in range(adapter.count) for n in adapter.block_tensors(index)]
    for name in [*order, *adapter.outside_tensors()]:
        path = name.removesuffix(".weight")
        if path == name or path not in {*modules, embedding}:
            continue
        shape = model.weight_info(name).shape
        module = modules.get(path, adapter.family.embedding)
        block = _block(module, adapter)
        turned = adapter.family.transposed and block is not None
        rows, columns = (shape[1], shape[0]) if turned else (shape[0], shape[1])
        part: Literal["linear", "head", "embedding"] = "linear" if block is not None else "head"
        if path == embedding:  # which a tied head is, too
            part = "embedding"
        found.append(Matrix(path, module, block, part, rows, columns))
    return found


def scheme_of(model: Checkpoint, path: str) -> Scheme | None:
    """Bits, groups and symmetry of a linear that `codes` has codes of, by what config.json says.

    None if it has none. group_size is -1 only where the layout says so.
    """
    if path not in model.packing.shapes or corrected(model, path):
        return None
    kind = model.packing.kind(path)
    if "symmetric" in kind:
        return Scheme(kind["bits"], kind["group_size"], kind["symmetric"])
    if kind["kind"] == "int8":
        return Scheme(8, -1, True)
    # Zeros in more bits than codes have, or as numbers of a type, may be between codes.
    if kind["kind"] != "affine" or not 0 <= kind.get("zero_bits", -1) <= kind["bits"]:
        return None
    return Scheme(kind["bits"], kind["group_size"], kind["zero_bits"] == 0)


def corrected(model: Checkpoint, path: str) -> bool:
    """Whether corrections are to be merged into the weight of the linear `path`."""
    return model.adapter is not None and path in model.adapter.ranks


def codes(model: Checkpoint, path: str) -> Packed | None:
    """The codes of a linear that is stored on a uniform grid whose zeros are codes, too.

    Of (out, in) weights; None if it is stored otherwise, or a correction is merged into it.
    """
    found = affine(model, path)
    if found is None or isinstance(found, Packed):
        return found
    zero = found.zero
    whole = torch.equal(zero, zero.round()) and zero.min() >= 0 and zero.max() < 2**found.bits
    if not whole:
        return None
    return Packed(found.codes, Grid(found.scale, zero, found.bits, found.dtype))


def affine(model: Checkpoint, path: str) -> Packed | AffineCodes | None:
    """The same, where zeros may be any numbers."""
    if path not in model.packing.shapes:
        return None
    if corrected(model, path):
        return None
    parts = model.load(model.packing.names(path))
    if model.packing.kind(path).get("kind") == "int8":
        rows = IntegerCodes(parts[f"{path}.weight"], parts[f"{path}.SCB"], torch.float32)
        scale = torch.where(rows.absmax > 0, rows.absmax * FRACTION, 1.0)[:, None]
        middle = torch.full_like(scale, 128)
        return Packed((rows.codes.int() + 128).to(torch.uint8), Grid(scale, middle, 8))
    return model.packing.uniform(path, parts)


def weight(model: Checkpoint, matrix: Matrix, *, transposed: bool) -> Tensor:
    """The dense weight of a matrix, (out, in) in the model's type, corrections merged if any are.

    transposed: of the model's family.
    """
    found = model.load_weights([matrix.name])[matrix.name].to(model.dtype)
    return found.T.contiguous() if transposed and matrix.block is not None else found


def _block(module: str, adapter: ModelAdapter) -> int | None:
    own = f"{adapter.family.blocks}."
    return int(module.removeprefix(own).partition(".")[0]) if module.startswith(own) else None
