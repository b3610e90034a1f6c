"""Packed linears on disk: the layout of GPTQ, which auto-round writes too.

A linear `<path>` of shape (rows, columns), `bits` bits and groups of `group_size` columns is

    <path>.qweight  int32 (columns * bits / 32, rows): the codes of each row as one bit stream along
                    the columns, lowest bit first, in little-endian words
    <path>.qzeros   int32 (groups, rows * bits / 32): the zeros of each group as such a stream
    <path>.scales   float16 (groups, rows)
    <path>.g_idx    int32 (columns,): the group of each column; auto-round has none

and stands for scale * (code - zero). Version 1 of it stores zeros less 1, as they fit the bits;
version 2 stores them as they are. Nothing but config.json tells one from the other. Readers differ
in what a stored zero of -1 means, so only zeros from 1 are written in version 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from compresso.checkpoint.directory import Load, TensorInfo
from compresso.checkpoint.layout import Scheme, module_of
from compresso.errors import CheckpointError
from compresso.kernels.grid import Grid, Packed
from compresso.kernels.packing import pack_rows, unpack_rows

GPTQ, AUTO_ROUND = "gptq", "auto-round"
METHODS = (GPTQ, AUTO_ROUND)
ENDING = ".qweight"
WIDTHS = (2, 3, 4, 8)
REGEX = "*+?^$()[]{}|\\"  # what tells a pattern from a name
WORD = 32
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# By what config.json calls them: whether stored zeros are less 1.
LESS_ONE = {
    "gptq": True,
    "gptq_v2": False,
    "auto_round:auto_gptq": True,
    "auto_round:gptqmodel": False,
    "auto_round": False,
}


def packed_names(path: str, *, ordered: bool) -> list[str]:
    """Names of the tensors that store the linear `path`. ordered: `g_idx` among them."""
    parts = ["qweight", "qzeros", "scales", *(["g_idx"] if ordered else [])]
    return [f"{path}.{part}" for part in parts]


def why_not(packed: Packed) -> str | None:
    """Why the layout cannot hold these codes exactly, in words that go on `...`; None if it can."""
    rows, columns = packed.codes.shape
    grid = packed.grid
    if grid.bits not in WIDTHS:
        return f"has codes of {grid.bits} bits"
    if rows % WORD or columns % WORD:
        return f"is {rows} x {columns}, which {WORD} does not divide"
    if not torch.equal(grid.zero, grid.zero.round().clamp(0, grid.max_code)):
        return "has zeros that are not codes"
    if not torch.equal(grid.scale.half().float(), grid.scale.float()):
        return "has scales that float16 does not hold"
    return None


def pack(path: str, packed: Packed, *, less_one: bool, ordered: bool) -> dict[str, Tensor]:
    """The tensors that store a quantized linear.

    path:     module path of the linear, such as `model.layers.0.mlp.up_proj`.
    packed:   codes (rows, columns) and their grid. Not modified.
    less_one: store zeros less 1: version 1.
    ordered:  store the group of each column.

    Raises ValueError if they would not survive.
    """
    if problem := why_not(packed):
        raise ValueError(f"`{path}` {problem}")
    grid, columns = packed.grid, packed.codes.shape[1]
    zeros = grid.zero - int(less_one)
    if zeros.min() < 0:
        raise ValueError(f"`{path}` has zeros of 0, which version 1 cannot tell from others")
    groups = grid.scale.shape[1]
    words = pack_rows(packed.codes, grid.bits).T
    tensors = {
        f"{path}.qweight": words.contiguous(),
        f"{path}.qzeros": pack_rows(zeros.T.to(torch.uint8).contiguous(), grid.bits),
        f"{path}.scales": grid.scale.T.half().contiguous(),
    }
    if ordered:
        index = torch.arange(columns) // (columns // groups)
        tensors[f"{path}.g_idx"] = index.to(torch.int32)
    return tensors


def unpack(path: str, tensors: Mapping[str, Tensor], scheme: Scheme, *, less_one: bool) -> Packed:
    """Read a packed linear back, its columns in the order they have in memory.

    tensors: at least `qweight`, `qzeros` and `scales`. Not modified.

    Raises CheckpointError if their shapes or types do not fit the scheme.
    """
    words, zeros, scales = (tensors[name] for name in packed_names(path, ordered=False))
    rows, columns = words.shape[1], words.shape[0] * WORD // scheme.bits
    groups = scheme.groups(columns)
    _check(f"{path}.qweight", words, (columns * scheme.bits // WORD, rows), torch.int32)
    _check(f"{path}.qzeros", zeros, (groups, rows * scheme.bits // WORD), torch.int32)
    _check(f"{path}.scales", scales, (groups, rows), *FLOATS)
    codes = unpack_rows(words.T.contiguous(), scheme.bits, columns)
    zero = unpack_rows(zeros, scheme.bits, rows).T.float()
    zero = (zero + int(less_one)) % 2**scheme.bits
    scale = scales.T.contiguous()
    return Packed(codes, Grid(scale.float(), zero.contiguous(), scheme.bits, scale.dtype))


class Gptq:
    """The linears of a GPTQ or auto-round checkpoint: a `Packing`, see packings.py."""

    def __init__(
        self,
        config: dict[str, Any],
        infos: Mapping[str, TensorInfo],
        load: Load,
    ) -> None:
        """config: a parsed config.json. infos: every stored tensor. load: reads some of them.

        Raises CheckpointError if the checkpoint is quantized in a way that cannot be decoded, or a
        tensor is absent.
        """
        entry = config["quantization_config"]
        form = entry.get("packing_format") or entry.get("checkpoint_format", "gptq")
        if form not in LESS_ONE or entry.get("data_type", "int") != "int":
            raise CheckpointError(f"weights packed as `{form}` cannot be read")
        self._less_one = LESS_ONE[form]
        paths = [name.removesuffix(ENDING) for name in infos if name.endswith(ENDING)]
        self._ordered = {path for path in paths if f"{path}.g_idx" in infos}
        self.schemes = {path: _scheme(path, entry) for path in paths}
        load(name for path in paths for name in self.names(path) if name not in infos)  # refuses
        self.shapes: dict[str, tuple[int, int]] = {}
        for path, scheme in self.schemes.items():
            words, rows = infos[f"{path}{ENDING}"].shape
            self.shapes[path] = (rows, words * WORD // scheme.bits)

    def names(self, path: str) -> list[str]:
        """Names of the tensors that store the linear `path`."""
        return packed_names(path, ordered=path in self._ordered)

    def decode(self, path: str, parts: dict[str, Tensor]) -> Tensor:
        """Its weight, (rows, columns) float32. parts: the tensors of `names`. Not modified."""
        return self.uniform(path, parts).decode()

    def uniform(self, path: str, parts: dict[str, Tensor]) -> Packed:
        """Its codes. parts: as `decode` takes them.

        Raises CheckpointError if columns of a group are not side by side.
        """
        scheme = self.schemes[path]
        if path in self._ordered:
            columns = self.shapes[path][1]
            usual = torch.arange(columns) // (columns // scheme.groups(columns))
            if not torch.equal(parts[f"{path}.g_idx"].long(), usual):
                raise CheckpointError(
                    f"`{path}` is packed with columns reordered across groups, which cannot be read"
                )
        return unpack(path, parts, scheme, less_one=self._less_one)

    def kind(self, path: str) -> dict[str, Any]:
        """How it is stored, in plain values."""
        return asdict(self.schemes[path])


def _scheme(path: str, entry: dict[str, Any]) -> Scheme:
    """How a linear is packed, by the `quantization_config` and what that says of it apart."""
    others = entry.get("extra_config") or {}
    if (named := module_of(path, others)) is not None:
        entry = {**entry, **others[named]}
    else:
        for pattern, own in others.items():
            if any(letter in REGEX for letter in pattern) and re.search(pattern, path):
                entry = {**entry, **own}
                break
    scheme = Scheme(entry["bits"], entry["group_size"], bool(entry["sym"]))
    if entry.get("dynamic") or scheme.bits not in WIDTHS:
        what = "rules by layer" if entry.get("dynamic") else f"{scheme.bits} bits"
        raise CheckpointError(f"`{path}` is packed with {what}, which cannot be read")
    return scheme


def gptq_config(scheme: Scheme, *, only: Iterable[str] | None) -> dict[str, Any]:
    """The `quantization_config` entry of a GPTQ checkpoint.

    scheme: of all packed linears.
    only:   names in transformers of the packed linears, if some of those in blocks are not packed.
    """
    entry: dict[str, Any] = {
        "quant_method": GPTQ,
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
    }
    if only is not None:
        entry["modules_in_block_to_quantize"] = [[name] for name in only]
    return entry


def auto_round_config(
    schemes: Mapping[str, Scheme], *, blocks: str, kept: Iterable[str]
) -> dict[str, Any]:
    """The `quantization_config` entry of an auto-round checkpoint.

    schemes: of each packed linear, by its name in transformers.
    blocks:  the list of blocks in transformers, such as `model.layers`.
    kept:    names in transformers of the linears in blocks that are not packed.
    """
    found = list(schemes.values())
    usual = max(dict.fromkeys(found), key=found.count)
    others: dict[str, dict[str, Any]] = {
        name: _entry(own)
        for name, own in schemes.items()
        if own != usual or not name.startswith(f"{blocks}.")
    }
    others |= {name: {"bits": 16, "data_type": "float"} for name in kept}
    symmetric = all(scheme.symmetric for scheme in found)
    return {
        "quant_method": AUTO_ROUND,
        "packing_format": "auto_round:auto_gptq" if symmetric else "auto_round",
        **_entry(usual),
        "block_name_to_quantize": blocks,
        **({"extra_config": others} if others else {}),
    }


def _entry(scheme: Scheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "data_type": "int",
    }


def _check(name: str, tensor: Tensor, shape: tuple[int, int], *dtypes: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise CheckpointError(
            f"`{name}` is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {dtypes[0]}",
            hint="copy or download the checkpoint again",
        )
