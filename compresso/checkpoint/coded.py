"""Compresso's own codes on disk: vector grids, and uniform grids with any zeros.

compressed-tensors has no layout for these. A linear `<path>` of shape (rows, columns) is

    <path>.weight_codes  int32 (rows, words): the codes of each row as one bit stream, as pack_rows
                         lays it out
    <path>.weight_scale  `dtype` (rows, groups)
    <path>.weight_zero   `zero_dtype`, which is `dtype` unless given, (rows, groups), if affine

and what they mean stands in config.json, each kind of coding once:

    "compresso": {
      ...,
      "coded": {"model.layers.0.mlp.up_proj": "p2n256-1024", ...},   by module path
      "coded_kinds": {
        "p2n256-1024": {"kind": "vector", "dtype": "bfloat16", "block": 1024,
                        "points": [[...], ...]},
        "b3g64": {"kind": "affine", "dtype": "bfloat16", "bits": 3, "group_size": 64},
        "b2g64-float16-zeros": {"kind": "affine", "dtype": "bfloat16", "zero_dtype": "float16", ...}
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

from compresso.checkpoint.directory import Load, TensorInfo
from compresso.checkpoint.layout import SCALES, module_of
from compresso.errors import CheckpointError
from compresso.kernels.grid import Grid, Packed
from compresso.kernels.higgs import VectorCodes
from compresso.kernels.hqq import AffineCodes
from compresso.kernels.packing import pack_rows, unpack_rows
from compresso.kernels.vector_grid import VectorGrid

KEY = "compresso"
CODED, KINDS = "coded", "coded_kinds"
ENDING = ".weight_codes"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SCALES}

Codes = VectorCodes | AffineCodes | Packed
Kind = dict[str, Any]


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


def packed_names(path: str, *, affine: bool) -> list[str]:
    """Names of the tensors that store the linear `path`. affine: its codes are, not vectors."""
    parts = ["weight_codes", "weight_scale"] + ["weight_zero"] * affine
    return [f"{path}.{part}" for part in parts]


def pack(path: str, codes: Codes) -> dict[str, Tensor]:
    """The tensors that store a coded linear.

    path:  of the linear in the checkpoint.
    codes: of (rows, columns) weights. Not modified.

    Raises ValueError if the type they are to be stored in does not hold the scales or zeros.
    """
    grid = codes.grid if isinstance(codes, Packed) else codes
    exact = {"weight_scale": (grid.scale, grid.dtype)}
    if not isinstance(grid, VectorCodes):
        exact["weight_zero"] = (grid.zero, _zeros_in(grid))
    _, kind = _kind_of(codes)
    tensors = {f"{path}{ENDING}": pack_rows(codes.codes, _sizes(kind)[2])}
    for name, (values, dtype) in exact.items():
        stored = values.to(dtype).contiguous()
        if not torch.equal(stored.float(), values.float()):
            raise ValueError(f"`{path}.{name}` is not exact in {dtype}")
        tensors[f"{path}.{name}"] = stored
    return tensors


def describe(linears: Mapping[str, Codes], *, transposed: bool = False) -> dict[str, Any]:
    """What config.json has to say about some coded linears: `coded` and `coded_kinds`.

    linears:    by module path in transformers.
    transposed: whether their dense weights are stored (columns, rows).
    """
    coded: dict[str, str] = {}
    kinds: dict[str, Kind] = {}
    for path, codes in linears.items():
        coded[path], kind = _kind_of(codes)
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
        for name in {*coded.values()}:
            _check_kind(name, self._kinds[name])
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
        return packed_names(path, affine=self._kind(path)["kind"] == "affine")

    def decode(self, path: str, parts: dict[str, Tensor]) -> Tensor:
        """Its dense weight, float32. parts: the tensors of `names`. Not modified.

        Raises CheckpointError if a code stands for nothing.
        """
        weight = self._codes(path, parts).decode()
        return weight.T.contiguous() if self._kind(path).get("transposed") else weight

    def uniform(self, path: str, parts: dict[str, Tensor]) -> AffineCodes | None:
        """Its codes, of (out, in) weights, if they are affine. parts: as `decode` takes them."""
        if self._kind(path)["kind"] != "affine":
            return None
        found = self._codes(path, parts)
        assert isinstance(found, AffineCodes)
        return found

    def _codes(self, path: str, parts: dict[str, Tensor]) -> AffineCodes | VectorCodes:
        kind = self._kind(path)
        group, weights, bits = _sizes(kind)
        scale = parts[f"{path}.weight_scale"]
        codes = unpack_rows(parts[f"{path}{ENDING}"], bits, scale.shape[1] * group // weights)
        if kind["kind"] == "affine":
            zero = parts[f"{path}.weight_zero"]
            return AffineCodes(codes, scale.float(), zero.float(), bits, scale.dtype, zero.dtype)
        grid = VectorGrid(torch.tensor(kind["points"], dtype=torch.float32))
        if int(codes.max()) >= grid.size:
            raise CheckpointError(
                f"`{path}` holds the code {int(codes.max())} of {grid.size} points",
                hint="copy or download the checkpoint again",
            )
        return VectorCodes(codes, scale.float(), grid, group, scale.dtype)

    def kind(self, path: str) -> dict[str, Any]:
        """How it is stored, in plain values."""
        kind = {k: v for k, v in self._kind(path).items() if k not in ("points", "transposed")}
        if points := self._kind(path).get("points"):
            kind["grid"] = f"p{len(points[0])}n{len(points)}"
        return kind

    def _kind(self, path: str) -> Kind:
        kind: Kind = self._kinds[self._of[path]]
        return kind

    def _shape(self, path: str, infos: Mapping[str, TensorInfo]) -> tuple[int, int]:
        """Of the dense weight. Raises CheckpointError if the stored tensors do not fit the kind."""
        kind = self._kind(path)
        scale = infos[f"{path}.weight_scale"].shape
        rows, groups = scale if len(scale) == 2 else (0, 0)
        group, weights, bits = _sizes(kind)
        columns = groups * group
        words = -(-columns // weights * bits // 32)
        types = {
            ENDING: torch.int32,
            ".weight_scale": DTYPES[kind["dtype"]],
            ".weight_zero": DTYPES[str(kind.get("zero_dtype", kind["dtype"]))],
        }
        for name in self.names(path):
            part = name.removeprefix(path)
            shape, stored = (rows, words if part == ENDING else groups), types[part]
            info = infos[name]
            if info.shape != shape or info.dtype != stored:
                raise CheckpointError(
                    f"`{name}` is {info.shape} {info.dtype}, not {shape} {stored}",
                    hint="copy or download the checkpoint again",
                )
        return (columns, rows) if kind.get("transposed") else (rows, columns)


def _check_kind(name: str, kind: Kind) -> None:
    """Raises CheckpointError if it is not one that can be decoded."""
    try:
        sizes = (*_sizes(kind), *{len(point) for point in kind.get("points", ())})
        types = {kind["dtype"], kind.get("zero_dtype", kind["dtype"])}
        known = types <= {*DTYPES} and kind["kind"] in ("affine", "vector")
    except (LookupError, TypeError, AttributeError):
        known, sizes = False, ()
    if not known or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(f"the coding `{name}` in config.json cannot be read")


def _sizes(kind: Kind) -> tuple[int, int, int]:
    """Weights that share a scale, weights of one code, and bits of one code."""
    if kind["kind"] == "affine":
        return kind["group_size"], 1, kind["bits"]
    points = kind["points"]
    return kind["block"], len(points[0]), (len(points) - 1).bit_length()


def _kind_of(codes: Codes) -> tuple[str, Kind]:
    """Name and description of how these are coded."""
    dtype = codes.grid.dtype if isinstance(codes, Packed) else codes.dtype
    stored = {"dtype": str(dtype).removeprefix("torch.")}
    if isinstance(codes, VectorCodes):
        points = codes.grid.points.tolist()
        kind = {"kind": "vector", **stored, "block": codes.block, "points": points}
        return f"{codes.grid.name}-{codes.block}", kind
    grid = codes.grid if isinstance(codes, Packed) else codes
    size = codes.codes.shape[1] // grid.scale.shape[1]
    name = f"b{grid.bits}g{size}"
    if (zeros := _zeros_in(grid)) != dtype:
        stored["zero_dtype"] = str(zeros).removeprefix("torch.")
        name += f"-{stored['zero_dtype']}-zeros"
    return name, {"kind": "affine", **stored, "bits": grid.bits, "group_size": size}


def _zeros_in(grid: Grid | AffineCodes) -> torch.dtype:
    return grid.zeros_in if isinstance(grid, AffineCodes) else grid.dtype
