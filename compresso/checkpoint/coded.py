"""Compresso's own codes on disk: vector grids, and uniform grids with any zeros.

compressed-tensors has no layout for these. A linear `<path>` of shape (rows, columns) is

    <path>.weight_codes  int32 (rows, words): the codes of each row as one bit stream, as pack_rows
                         lays it out
    <path>.weight_scale  `dtype` (rows, groups); if `scale_bits` is 8, int8, in 128ths of
    <path>.weight_row_scale  `dtype` (rows, 1), stored only then
    <path>.weight_zero   of an affine kind: `dtype`, or `zero_dtype` if it has that, (rows, groups);
                         or, if it has `zero_bits`, int32 (groups, words): as many bits of each
                         group's zeros as one bit stream, in parts of 2**(bits - zero_bits); not
                         stored if these are 0, for zeros are then 2**(bits - 1)

and what they mean stands in config.json, each kind of coding once:

    "compresso": {
      ...,
      "coded": {"model.layers.0.mlp.up_proj": "p2n256-1024", ...},   by module path
      "coded_kinds": {
        "p2n256-1024": {"kind": "vector", "dtype": "bfloat16", "block": 1024,
                        "points": [[...], ...]},
        "b3g64": {"kind": "affine", "dtype": "bfloat16", "bits": 3, "group_size": 64},
        "b2g32z2s8": {"kind": "affine", "dtype": "bfloat16", "bits": 2, "group_size": 32,
                      "zero_bits": 2, "scale_bits": 8}
      }
    }

A vector code stands for a point, that is for as many neighbouring weights of a row as a point has
numbers; the points of a block are scaled and turned back by an orthonormal Hadamard transform. An
affine code stands for (code - zero) * scale. Both are computed in float32 and rounded once to
`dtype`. Where a kind is `transposed`, the dense weight is (columns, rows).

`models/coded_linear.py`, which comes with such a checkpoint, decodes to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from compresso.checkpoint.coded_kinds import (
    CODES,
    ROW_SCALE,
    SCALE,
    ZERO,
    Codes,
    Form,
    Kind,
    kind_of,
)
from compresso.checkpoint.directory import Load, TensorInfo
from compresso.checkpoint.layout import module_of
from compresso.errors import CheckpointError
from compresso.kernels.grid import Packed
from compresso.kernels.higgs import VectorCodes
from compresso.kernels.hqq import AffineCodes
from compresso.kernels.packing import pack_rows, unpack_rows
from compresso.kernels.scales import PARTS
from compresso.kernels.vector_grid import VectorGrid

KEY = "compresso"
CODED, KINDS = "coded", "coded_kinds"
ENDING = f".{CODES}"


def coding_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What a parsed config.json says of coded linears: `coded` and `coded_kinds`; None if nothing.

    Raises CheckpointError if it says half of it.
    """
    plan = config.get(KEY)
    if not isinstance(plan, dict) or CODED not in plan:
        return None
    coded, kinds = plan[CODED], plan.get(KINDS)
    if not isinstance(coded, dict) or not isinstance(kinds, dict) or {*coded.values()} - {*kinds}:
        raise CheckpointError(f"`{CODED}` in config.json names codings that `{KINDS}` lacks")
    return {CODED: coded, KINDS: kinds}


def packed_names(path: str, *, zero: bool, row_scale: bool) -> list[str]:
    """Names of the tensors that store the linear `path`: whether zeros and scales of rows do."""
    parts = [CODES, SCALE] + [ROW_SCALE] * row_scale + [ZERO] * zero
    return [f"{path}.{part}" for part in parts]


def pack(path: str, codes: Codes, *, symmetric: bool = False) -> dict[str, Tensor]:
    """The tensors that store a coded linear.

    path:      of the linear in the checkpoint.
    codes:     of (rows, columns) weights. Not modified.
    symmetric: of a uniform grid: its zeros are not stored.

    Raises ValueError if the form they are to be stored in does not hold the scales or zeros.
    """
    grid = codes.grid if isinstance(codes, Packed) else codes
    form = Form.read(*kind_of(codes, symmetric=symmetric))
    tensors = {CODES: pack_rows(codes.codes, form.bits)}
    if grid.row_scale is None:
        tensors[SCALE] = grid.scale.to(form.dtype)
    else:
        tensors[SCALE] = (grid.scale / (grid.row_scale / PARTS)).round().to(torch.int8)
        tensors[ROW_SCALE] = grid.row_scale.to(form.dtype)
    if not isinstance(grid, VectorCodes):
        part = 2.0 ** (form.bits - (form.zero_bits or 0))
        if form.zero_bits is None:
            tensors[ZERO] = grid.zero.to(form.zero_dtype or form.dtype)
        elif form.zero_bits:
            parts = (grid.zero / part).clamp(0, 2**form.zero_bits - 1).to(torch.uint8)
            tensors[ZERO] = pack_rows(parts.T.contiguous(), form.zero_bits)
        zero = _zero(tensors, form, len(codes.codes))
        if not torch.equal(zero.expand_as(grid.zero), grid.zero.float()):
            raise ValueError(f"`{path}.{ZERO}` is not exact as it is to be stored")
    if not torch.equal(_scale(tensors), grid.scale.float()):
        raise ValueError(f"`{path}.{SCALE}` is not exact as it is to be stored")
    return {f"{path}.{name}": tensor.contiguous() for name, tensor in tensors.items()}


def describe(
    linears: Mapping[str, Codes], *, transposed: bool = False, symmetric: bool = False
) -> dict[str, Any]:
    """What config.json has to say about some coded linears: `coded` and `coded_kinds`.

    linears:    by module path in transformers.
    transposed: whether their dense weights are stored (columns, rows).
    symmetric:  as in `pack`.
    """
    coded: dict[str, str] = {}
    kinds: dict[str, Kind] = {}
    for path, codes in linears.items():
        coded[path], kind = kind_of(codes, symmetric=symmetric)
        kinds[coded[path]] = kind | ({"transposed": True} if transposed else {})
    return {CODED: coded, KINDS: kinds}


def merge(descriptions: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What config.json has to say about the linears of all these descriptions.

    Raises ValueError if two of them mean different codings by one name.
    """
    merged: dict[str, Any] = {CODED: {}, KINDS: {}}
    for description in descriptions:
        merged[CODED] |= description[CODED]
        for name, kind in description[KINDS].items():
            if merged[KINDS].setdefault(name, kind) != kind:
                raise ValueError(f"two codings are called `{name}`")
    return merged


class Coded:
    """The coded linears of a checkpoint: a `Packing`, see packings.py."""

    def __init__(
        self,
        config: dict[str, Any],
        infos: Mapping[str, TensorInfo],
        load: Load,
    ) -> None:
        """config: a parsed config.json. infos: every stored tensor. load: reads some of them.

        Raises CheckpointError if a coded linear or what config.json says of it is absent, or the
        two do not fit.
        """
        description = coding_of(config) or {CODED: {}, KINDS: {}}
        coded, self._kinds = description[CODED], description[KINDS]
        self._of: dict[str, str] = {}
        self._forms = {name: Form.read(name, self._kinds[name]) for name in {*coded.values()}}
        found = set()
        for path in (name.removesuffix(ENDING) for name in infos if name.endswith(ENDING)):
            module = module_of(path, coded)
            if module is None:
                raise CheckpointError(f"`{path}` is coded, but config.json does not say how")
            found.add(module)
            self._of[path] = coded[module]
        load(f"{module}{ENDING}" for module in coded if module not in found)  # refuses
        self.shapes: dict[str, tuple[int, int]] = {}
        for path in self._of:
            load(name for name in self.names(path) if name not in infos)  # likewise
            self.shapes[path] = self._shape(path, infos)

    def names(self, path: str) -> list[str]:
        """Names of the tensors that store the linear `path`."""
        form = self._forms[self._of[path]]
        return packed_names(path, zero=form.zero_bits != 0, row_scale=form.scale_bits == 8)

    def decode(self, path: str, parts: dict[str, Tensor]) -> Tensor:
        """Its dense weight, float32. parts: the tensors of `names`. Not modified.

        Raises CheckpointError if a code stands for nothing.
        """
        weight = self._codes(path, parts).decode()
        return weight.T.contiguous() if self._kinds[self._of[path]].get("transposed") else weight

    def uniform(self, path: str, parts: dict[str, Tensor]) -> AffineCodes | None:
        """Its codes, of (out, in) weights, if they are affine. parts: as `decode` takes them."""
        if self._kinds[self._of[path]]["kind"] != "affine":
            return None
        found = self._codes(path, parts)
        assert isinstance(found, AffineCodes)
        return found

    def _codes(self, path: str, parts: dict[str, Tensor]) -> AffineCodes | VectorCodes:
        kind, form = self._kinds[self._of[path]], self._forms[self._of[path]]
        own = {name.removeprefix(f"{path}."): parts[name] for name in self.names(path)}
        scale = _scale(own)
        vectors = scale.shape[1] * form.group // form.weights
        codes = unpack_rows(own[CODES], form.bits, vectors)
        row_scale = own[ROW_SCALE].float() if ROW_SCALE in own else None
        if kind["kind"] == "affine":
            zero = _zero(own, form, len(codes)).expand_as(scale)
            stored = (row_scale, form.zero_bits, form.zero_dtype)
            return AffineCodes(codes, scale, zero, form.bits, form.dtype, *stored)
        grid = VectorGrid(torch.tensor(kind["points"], dtype=torch.float32))
        if int(codes.max()) >= grid.size:
            raise CheckpointError(
                f"`{path}` holds the code {int(codes.max())} of {grid.size} points",
                hint="copy or download the checkpoint again",
            )
        return VectorCodes(codes, scale, grid, form.group, form.dtype, row_scale)

    def kind(self, path: str) -> dict[str, Any]:
        """How it is stored, in plain values."""
        whole = self._kinds[self._of[path]]
        kind = {k: v for k, v in whole.items() if k not in ("points", "transposed")}
        if points := whole.get("points"):
            kind["grid"] = f"p{len(points[0])}n{len(points)}"
        return kind

    def _shape(self, path: str, infos: Mapping[str, TensorInfo]) -> tuple[int, int]:
        """Of the dense weight. Raises CheckpointError if the stored tensors do not fit the kind."""
        form = self._forms[self._of[path]]
        scale = infos[f"{path}.{SCALE}"].shape
        rows, groups = scale if len(scale) == 2 else (0, 0)
        columns = groups * form.group
        for part, (shape, stored) in form.parts(rows, columns).items():
            info = infos[f"{path}.{part}"]
            if info.shape != shape or info.dtype != stored:
                raise CheckpointError(
                    f"`{path}.{part}` is {info.shape} {info.dtype}, not {shape} {stored}",
                    hint="copy or download the checkpoint again",
                )
        transposed = self._kinds[self._of[path]].get("transposed")
        return (columns, rows) if transposed else (rows, columns)


def _scale(parts: Mapping[str, Tensor]) -> Tensor:
    """Scales of groups, (rows, groups) float32, by what stores a linear."""
    scale = parts[SCALE].float()
    return scale * (parts[ROW_SCALE].float() / PARTS) if ROW_SCALE in parts else scale


def _zero(parts: Mapping[str, Tensor], form: Form, rows: int) -> Tensor:
    """Zeros, (rows, groups) float32, or (1, 1) if all are alike, by what stores a linear."""
    if form.zero_bits is None:
        return parts[ZERO].float()
    if form.zero_bits == 0:
        return torch.full((1, 1), 2.0 ** (form.bits - 1), device=parts[CODES].device)
    found = unpack_rows(parts[ZERO], form.zero_bits, rows).T.float()
    return found * 2.0 ** (form.bits - form.zero_bits)
