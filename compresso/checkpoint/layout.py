"""Packed linears on disk: the `pack-quantized` layout of compressed-tensors.

A linear `<path>` of shape (rows, columns), `bits` bits and groups of `group_size` columns is

    <path>.weight_packed      int32 (rows, ceil(columns * bits / 32)): the codes of each row as one
                              bit stream, lowest bit first, in little-endian words
    <path>.weight_scale       model dtype (rows, groups)
    <path>.weight_shape       int64 (2,): rows, columns
    <path>.weight_zero_point  int32 (ceil(rows * bits / 32), groups), if asymmetric: the zeros of
                              each group as one such bit stream along the rows

and stands for scale * (code - zero), with zero = 2**(bits - 1) if symmetric. compressed-tensors
0.18 and later read every width; earlier ones read 2, 4 and 8 bits.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compresso.errors import CheckpointError
from compresso.kernels.grid import Grid, Packed
from compresso.kernels.packing import pack_rows, unpack_rows

METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
CODES = ".weight_packed"
SCALES = (torch.bfloat16, torch.float16, torch.float32)
HEAD, OLD_HEAD = "lm_head", "embed_out"


@dataclass(frozen=True)
class Scheme:
    """How a linear is packed. group_size: columns sharing a scale; -1 for the whole row."""

    bits: int
    group_size: int
    symmetric: bool

    def groups(self, columns: int) -> int:
        """How many groups `columns` columns make."""
        return 1 if self.group_size == -1 else columns // self.group_size


def packed_names(path: str, scheme: Scheme) -> list[str]:
    """Names of the tensors that store the linear `path`."""
    parts = ["weight_packed", "weight_scale", "weight_shape"]
    if not scheme.symmetric:
        parts.append("weight_zero_point")
    return [f"{path}.{part}" for part in parts]


def pack(path: str, packed: Packed, dtype: torch.dtype, *, symmetric: bool) -> dict[str, Tensor]:
    """The tensors that store a quantized linear.

    path:      module path of the linear, such as `model.layers.0.mlp.up_proj`.
    packed:    codes (rows, columns) and their grid. Not modified.
    dtype:     type of the model's weights; every scale must be exact in it.
    symmetric: leave the zeros out; they must all be 2**(bits - 1).

    Raises ValueError if the scales or the zeros would not survive.
    """
    grid = packed.grid
    scale = grid.scale.to(dtype)
    if not torch.equal(scale.float(), grid.scale.float()):
        raise ValueError(f"scales of `{path}` are not exact in {dtype}")
    tensors = {
        f"{path}.weight_packed": pack_rows(packed.codes, grid.bits),
        f"{path}.weight_scale": scale.contiguous(),
        f"{path}.weight_shape": torch.tensor(packed.codes.shape, dtype=torch.int64),
    }
    if not symmetric:
        zeros = grid.zero.to(torch.uint8)
        if not torch.equal(zeros.float(), grid.zero.float()) or zeros.max() > grid.max_code:
            raise ValueError(f"zeros of `{path}` are not codes")
        words = pack_rows(zeros.T.contiguous(), grid.bits)
        tensors[f"{path}.weight_zero_point"] = words.T.contiguous()
    elif not torch.all(grid.zero == 2 ** (grid.bits - 1)):
        raise ValueError(f"`{path}` is not symmetric")
    return tensors


def unpack(path: str, tensors: dict[str, Tensor], scheme: Scheme) -> Packed:
    """Read a packed linear back. The inverse of `pack`.

    tensors: at least those of `packed_names`. Not modified.

    Raises CheckpointError if their shapes or types do not fit the scheme.
    """
    rows, columns = (int(size) for size in tensors[f"{path}.weight_shape"].tolist())
    if scheme.group_size != -1 and columns % scheme.group_size:
        raise CheckpointError(
            f"`{path}` has {columns} columns, which groups of {scheme.group_size} do not divide"
        )
    groups = scheme.groups(columns)
    words = tensors[f"{path}.weight_packed"]
    scale = tensors[f"{path}.weight_scale"]
    _check(f"{path}.weight_packed", words, (rows, _words(columns, scheme.bits)), torch.int32)
    _check(f"{path}.weight_scale", scale, (rows, groups), *SCALES)
    if scheme.symmetric:
        zero = torch.full((rows, groups), 2.0 ** (scheme.bits - 1), device=scale.device)
    else:
        zeros = tensors[f"{path}.weight_zero_point"]
        shape = (_words(rows, scheme.bits), groups)
        _check(f"{path}.weight_zero_point", zeros, shape, torch.int32)
        zero = unpack_rows(zeros.T.contiguous(), scheme.bits, rows).T.float().contiguous()
    codes = unpack_rows(words, scheme.bits, columns)
    return Packed(codes, Grid(scale.float(), zero, scheme.bits, scale.dtype))


def quantization_config(
    scheme: Scheme | Mapping[str, Scheme], *, ignore: Iterable[str]
) -> dict[str, Any]:
    """The `quantization_config` entry of a config.json.

    scheme: of all packed linears, or of each, by module path. Linears that a runtime fuses, such as
            q, k and v, must have the same.
    ignore: module paths of all linears that are not packed, a tied head included.

    One scheme for all comes with `dequantize`, which makes transformers decode while it loads.
    Without it, it decodes at the first forward, cannot read asymmetric codes, and cannot attach an
    adapter before. With it, it takes every linear to have the same scheme.

    Raises ValueError if the schemes are several and one of them is asymmetric.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    if isinstance(scheme, Scheme):
        by_scheme[scheme] = ["Linear"]
    else:
        for path, own in sorted(scheme.items()):
            by_scheme.setdefault(own, []).append(path)
    mixed = len(by_scheme) > 1
    if mixed and not all(own.symmetric for own in by_scheme):
        raise ValueError(
            f"`{METHOD}` cannot load several schemes of which some are asymmetric: store symmetric"
            " codes, or all linears as compresso's own codes (checkpoint/coded.py)"
        )
    groups = sorted(by_scheme.items(), key=lambda item: (item[0].bits, item[0].group_size))
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        # By name where there are several: names come before patterns and classes for every reader.
        "config_groups": {
            f"group_{index}": _config_group(own, paths if mixed else ["Linear"])
            for index, (own, paths) in enumerate(groups)
        },
        "ignore": sorted(ignore),
        **({} if mixed else {"dequantize": True}),
    }


def _config_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    channel = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "format": FORMAT,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def module_of(path: str, modules: Collection[str]) -> str | None:
    """The one of `modules`, paths in transformers, that a checkpoint calls `path`; None if none is.

    A checkpoint may leave out the prefix of the base model, or have the old name of the head.
    """
    if path in modules:
        return path
    if path == OLD_HEAD and HEAD in modules:
        return HEAD
    return next((module for module in modules if module.endswith(f".{path}")), None)


def schemes(config: dict[str, Any], paths: Iterable[str]) -> dict[str, Scheme]:
    """How each packed linear is packed, by the `quantization_config` of any tool.

    config: a parsed config.json. paths: module paths of the linears stored as codes.

    Raises CheckpointError if the checkpoint is quantized in a way that compresso cannot decode.
    """
    entry = config.get("quantization_config")
    paths = list(paths)
    if not isinstance(entry, dict):
        if paths:
            raise CheckpointError(f"`{paths[0]}` is packed, but there is no `quantization_config`")
        return {}
    method = entry.get("quant_method")
    if method != METHOD:
        raise CheckpointError(
            f"weights quantized by `{method}` cannot be read",
            hint=f"start from the original, or from a `{METHOD}` checkpoint",
        )
    if entry.get("format") not in (FORMAT, "mixed-precision") or not paths:
        raise CheckpointError(
            f"weights in `{METHOD}` format `{entry.get('format')}` cannot be read"
        )
    targets: dict[str, dict[str, Any]] = {}
    for group in entry.get("config_groups", {}).values():
        if not isinstance(group, dict):
            raise CheckpointError("a preset name in `config_groups` cannot be read")
        targets |= dict.fromkeys(group["targets"], group)
    return {path: _scheme(path, _group_of(path, targets)) for path in paths}


def _group_of(path: str, targets: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The group a packed linear belongs to: by its name, else by a pattern, else by its class."""
    if (named := module_of(path, targets)) is not None:
        return targets[named]
    for target in sorted(targets):  # compressed-tensors, too, tries patterns in this order
        if target.startswith("re:") and re.match(target.removeprefix("re:"), path):
            return targets[target]
    if "Linear" in targets:
        return targets["Linear"]
    raise CheckpointError(f"`{path}` is packed, but no group of `quantization_config` targets it")


def _scheme(path: str, group: dict[str, Any]) -> Scheme:
    weights = group.get("weights") or {}
    size = weights.get("group_size") or -1
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group")
    refused = {
        "quantized activations": group.get("input_activations") or group.get("output_activations"),
        f"format `{group.get('format')}`": group.get("format") not in (None, FORMAT),
        f"type `{weights.get('type')}`": weights.get("type", "int") != "int",
        f"{weights.get('num_bits')} bits": weights.get("num_bits") not in range(2, 9),
        f"strategy `{strategy}`": strategy not in ("group", "channel"),
        "columns reordered across groups": weights.get("actorder") in ("group", True),
    }
    for what, found in refused.items():
        if found:
            raise CheckpointError(f"`{path}` is packed with {what}, which cannot be read")
    return Scheme(
        weights["num_bits"], -1 if strategy == "channel" else size, weights.get("symmetric", True)
    )


def _words(values: int, bits: int) -> int:
    return -(-values * bits // 32)


def _check(name: str, tensor: Tensor, shape: tuple[int, int], *dtypes: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise CheckpointError(
            f"`{name}` is {tuple(tensor.shape)} {tensor.dtype}, not {shape} {dtypes[0]}",
            hint="compressed-tensors before 0.18 packed 3, 5, 6 and 7 bits in another layout: "
            "save again with a newer one",
        )
