"""From the tensors of a checkpoint to those of a GGUF file, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import NumericalError
from compresso.formats.gguf_blocks import Array, repack
from compresso.formats.gguf_families import Piece
from compresso.formats.gguf_types import DENSE, gguf_package
from compresso.formats.matrices import Matrix, affine, corrected
from compresso.formats.parts import How
from compresso.kernels.grid import Packed
from compresso.kernels.hqq import AffineCodes
from compresso.models.unfolded import UnfoldedCheckpoint


@dataclass(frozen=True)
class Encoded:
    """A tensor as it is written.

    type: as `gguf` calls it, in lower case. shape: of the weights. data: its bytes, in any shape.
    offset: whether offsets of groups were rounded to float16.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    data: Array
    how: How
    offset: bool = False


def encode(
    model: Checkpoint, piece: Piece, matrix: Matrix | None, *, wanted: str | None, dense: str | None
) -> Encoded:
    """A piece of a plan.

    matrix: what is known of it, if it may be stored as codes.
    wanted: keep its codes only if that makes this type; None for any.
    dense:  the type of what is not codes; None for the smallest that rounds nothing.

    Raises NumericalError if a number is too large for float16.
    """
    if piece.stored is None:
        return _made_up(piece)
    if matrix is not None and piece.factor == 1.0:
        codes = affine(model, matrix.path)
        if codes is not None and (found := _repacked(codes, piece, wanted)) is not None:
            return found
    tensor = model.load_weights([piece.stored])[piece.stored]
    if len(piece.shape) == 2 and not tensor.any():
        return _zeros(piece)
    if matrix is not None and corrected(model, matrix.path):
        tensor = tensor.to(model.dtype)
    ready = change(tensor, piece)
    how = _how(model, piece.stored, matrix)
    kind = "f32" if len(piece.shape) == 1 else dense or _smallest(ready)
    return Encoded(piece.name, kind, piece.shape, _as_dense(ready, kind, piece.stored), how)


def change(tensor: Tensor, piece: Piece) -> Tensor:
    """The weights as llama.cpp wants them. Not modified."""
    if piece.heads:
        tensor = permute(tensor, piece.heads)
    if piece.shift or piece.factor != 1.0:
        tensor = (tensor.float() + piece.shift) * piece.factor
    return tensor


def change_back(tensor: Tensor, piece: Piece) -> Tensor:
    """The inverse of `change`."""
    if piece.shift or piece.factor != 1.0:
        tensor = tensor / piece.factor - piece.shift
    if piece.heads:
        tensor = permute(tensor, piece.heads, back=True)
    return tensor


def permute(rows: Tensor, heads: int, *, back: bool = False) -> Tensor:
    """Put the two halves of each head's rows between each other, for rotation in pairs; or back."""
    split = (heads, -1, 2) if back else (heads, 2, -1)
    return rows.unflatten(0, split).transpose(1, 2).reshape(rows.shape).contiguous()


def decode(data: Array, kind: Any) -> Tensor:
    """Of a tensor as it lies in a file: float32. kind: `gguf.GGMLQuantizationType`."""
    return torch.from_numpy(
        np.array(gguf_package().quants.dequantize(data, kind), dtype=np.float32)
    )


def _repacked(codes: Packed | AffineCodes, piece: Piece, wanted: str | None) -> Encoded | None:
    if piece.heads:
        codes = _permuted(codes, piece.heads)
    blocks = repack(codes, rescale=True)
    if blocks is None or wanted not in (None, blocks.type):
        return None
    how: How = "rescaled" if blocks.rounded == "scales" else "repacked"
    offset = blocks.rounded == "offsets"
    return Encoded(piece.name, blocks.type, piece.shape, blocks.data, how, offset)


def _permuted(codes: Packed | AffineCodes, heads: int) -> Packed | AffineCodes:
    if isinstance(codes, Packed):
        grid = replace(
            codes.grid,
            scale=permute(codes.grid.scale, heads),
            zero=permute(codes.grid.zero, heads),
            row_scale=None,
        )
        return Packed(permute(codes.codes, heads), grid)
    return replace(
        codes,
        codes=permute(codes.codes, heads),
        scale=permute(codes.scale, heads),
        zero=permute(codes.zero, heads),
        row_scale=None,
    )


def _how(model: Checkpoint, name: str, matrix: Matrix | None) -> How:
    """Where a dense tensor comes from."""
    if matrix is not None and corrected(model, matrix.path):
        return "summed"
    if isinstance(model, UnfoldedCheckpoint) and model.added.get(name) in ("copied", "summed"):
        return "copied" if model.added[name] == "copied" else "summed"
    packed = matrix is not None and matrix.path in model.packing.shapes
    return "decoded" if packed else "kept"


def _made_up(piece: Piece) -> Encoded:
    kind = "f32" if len(piece.shape) == 1 else "f16"
    data = np.full(piece.shape, piece.fill, dtype=np.float32 if kind == "f32" else np.float16)
    return Encoded(piece.name, kind, piece.shape, data, "zeros")


def _zeros(piece: Piece) -> Encoded:
    """Zeros in the smallest type: blocks whose scale is 0."""
    rows, columns = piece.shape
    for kind, block, size in (("tq2_0", 256, 66), ("q4_0", 32, 18)):
        if columns % block == 0:
            data = np.zeros((rows, columns // block * size), dtype=np.uint8)
            return Encoded(piece.name, kind, piece.shape, data, "zeros")
    return Encoded(piece.name, "f16", piece.shape, np.zeros(piece.shape, dtype=np.float16), "zeros")


def _smallest(tensor: Tensor) -> str:
    """The smallest dense type that holds all its numbers."""
    for kind in ("f16", "bf16"):
        if torch.equal(tensor.to(DENSE[kind]).float(), tensor.float()):
            return kind
    return "f32"


def _as_dense(tensor: Tensor, kind: str, name: str) -> Array:
    found = tensor.to(DENSE[kind]).contiguous()
    if not torch.isfinite(found).all():
        raise NumericalError(
            f"`{name}` has numbers that float16 cannot hold", hint="pass `--type bf16`"
        )
    if kind == "bf16":
        return found.view(torch.uint8).numpy()
    return found.numpy()
