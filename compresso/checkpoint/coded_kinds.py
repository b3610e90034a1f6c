"""What a kind of coding stores for a linear: which tensors, of what shape and type.

A kind stands in config.json, in plain values: see coded.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from compresso.checkpoint.layout import SCALES
from compresso.errors import CheckpointError
from compresso.kernels.grid import Packed
from compresso.kernels.higgs import VectorCodes
from compresso.kernels.hqq import AffineCodes

Kind = dict[str, Any]
Codes = VectorCodes | AffineCodes | Packed
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SCALES}
CODES, SCALE, ROW_SCALE, ZERO = (
    f"weight_{part}" for part in ("codes", "scale", "row_scale", "zero")
)


@dataclass(frozen=True)
class Form:
    """How the linears of a kind are stored.

    dtype:     of decoded weights, and of scales and zeros that are not in fewer bits.
    group:     weights that share a scale. weights: of one code. bits: of one code.
    scale_bits: 8, or 16 for scales in `dtype`.
    zero_bits: as in `AffineCodes`; 0 where no zeros are stored. zero_dtype: likewise.
    """

    dtype: torch.dtype
    group: int
    weights: int
    bits: int
    scale_bits: int = 16
    zero_bits: int | None = 0
    zero_dtype: torch.dtype | None = None

    @classmethod
    def read(cls, name: str, kind: Kind) -> Form:
        """That of a kind. Raises CheckpointError, with its name, if it cannot be decoded."""
        try:
            form = cls._of(kind)
            whole = (form.group, form.weights, form.bits)
            known = all(isinstance(size, int) and size > 0 for size in whole)
            known &= {len(point) for point in kind.get("points", ())} <= {form.weights}
            known &= form.scale_bits in (8, 16) and form.zero_bits in (None, *range(9))
        except (LookupError, TypeError, AttributeError):
            known = False
        if not known:
            raise CheckpointError(f"the coding `{name}` in config.json cannot be read")
        return form

    @classmethod
    def _of(cls, kind: Kind) -> Form:
        word, scale_bits = kind["dtype"], kind.get("scale_bits", 16)
        dtype = DTYPES[word]
        if kind["kind"] == "affine":
            zero_bits, zero_dtype = kind.get("zero_bits"), DTYPES[str(kind.get("zero_dtype", word))]
            size, bits = kind["group_size"], kind["bits"]
            return cls(dtype, size, 1, bits, scale_bits, zero_bits, zero_dtype)
        if kind["kind"] != "vector":
            raise LookupError(kind["kind"])
        points = kind["points"]
        return cls(dtype, kind["block"], len(points[0]), (len(points) - 1).bit_length(), scale_bits)

    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Shape and type of what is stored for a linear, by the last word of its name."""
        groups = columns // self.group
        eight = self.scale_bits == 8
        found = {
            CODES: ((rows, _words(columns // self.weights, self.bits)), torch.int32),
            SCALE: ((rows, groups), torch.int8 if eight else self.dtype),
        }
        if eight:
            found[ROW_SCALE] = (rows, 1), self.dtype
        if self.zero_bits is None:
            found[ZERO] = (rows, groups), self.zero_dtype or self.dtype
        elif self.zero_bits:
            found[ZERO] = (groups, _words(rows, self.zero_bits)), torch.int32
        return found

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes stored for a linear."""
        parts = self.parts(rows, columns).values()
        return sum(prod(shape) * dtype.itemsize for shape, dtype in parts)


def kind_of(codes: Codes, *, symmetric: bool) -> tuple[str, Kind]:
    """Name and description of how these are stored. symmetric: of codes whose zeros are not."""
    grid = codes.grid if isinstance(codes, Packed) else codes
    eight = {} if grid.row_scale is None else {"scale_bits": 8}
    stored = {"dtype": str(grid.dtype).removeprefix("torch.")}
    suffix = "s8" if eight else ""
    if isinstance(grid, VectorCodes):
        points = grid.grid.points.tolist()
        kind = {"kind": "vector", **stored, "block": grid.block, "points": points}
        return f"{grid.grid.name}-{grid.block}{suffix}", kind | eight
    size = codes.codes.shape[1] // grid.scale.shape[1]
    kind = {"kind": "affine", **stored, "bits": grid.bits, "group_size": size}
    # The zeros of a grid are codes themselves.
    zero_bits = grid.zero_bits if isinstance(grid, AffineCodes) else (not symmetric) * grid.bits
    if zero_bits is not None:
        kind["zero_bits"], suffix = zero_bits, f"z{zero_bits}{suffix}"
    elif isinstance(grid, AffineCodes) and grid.zeros_in != grid.dtype:
        kind["zero_dtype"] = str(grid.zeros_in).removeprefix("torch.")
        suffix += f"-{kind['zero_dtype']}-zeros"
    return f"b{grid.bits}g{size}{suffix}", kind | eight


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)
