"""Packed linears on disk: the layouts of bitsandbytes, as transformers saves and loads them.

A linear `<path>` of shape (rows, columns) in 4 bits is

    <path>.weight              uint8 (ceil(rows * columns / 2), 1): two codes to a byte, the first
                               in the high half, row after row
    <path>.weight.absmax       float32 (blocks,), the largest of each block of weights; with double
                               quantization uint8, its codes
    <path>.weight.quant_map    float32 (16,), what codes stand for
    <path>.weight.quant_state.bitsandbytes__nf4   uint8: JSON of shape, block size and type
    <path>.weight.nested_absmax, .nested_quant_map   float32, with double quantization: of absmax

and in 8 bits

    <path>.weight              int8 (rows, columns)
    <path>.SCB                 float32 (rows,), the largest of each row
    <path>.weight_format       uint8 (), 0: by rows

Linears of a family that stores them transposed are stored (out, in) here like all others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from compresso.checkpoint.directory import TRANSPOSED, Load, TensorInfo
from compresso.errors import CheckpointError
from compresso.kernels.normal_float import (
    NESTED_BLOCK,
    FloatCodes,
    IntegerCodes,
    Kind,
    block_scaled,
    dynamic_levels,
    levels,
)

METHOD = "bitsandbytes"
STATE = ".weight.quant_state.bitsandbytes__"


def pack(path: str, codes: FloatCodes | IntegerCodes) -> dict[str, Tensor]:
    """The tensors that store a quantized linear.

    path: module path of the linear, such as `model.layers.0.mlp.up_proj`.

    Raises ValueError if blocks do not divide the columns: bitsandbytes decodes such a matrix
    wrongly on a CPU.
    """
    if isinstance(codes, IntegerCodes):
        return {
            f"{path}.weight": codes.codes.contiguous(),
            f"{path}.SCB": codes.absmax.contiguous(),
            f"{path}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    if codes.codes.shape[1] % codes.block:
        raise ValueError(f"blocks of {codes.block} do not divide the columns of `{path}`")
    flat = codes.codes.flatten()
    state: dict[str, Any] = {
        "quant_type": codes.kind,
        "blocksize": codes.block,
        "dtype": _word(codes.dtype),
        "shape": list(codes.codes.shape),
    }
    tensors = {
        f"{path}.weight": (flat[::2] << 4 | flat[1::2])[:, None],
        f"{path}.weight.absmax": codes.absmax.contiguous(),
        f"{path}.weight.quant_map": levels(codes.kind),
    }
    if codes.double:
        nested = codes.nested()
        tensors[f"{path}.weight.absmax"] = nested.codes
        tensors[f"{path}.weight.nested_absmax"] = nested.absmax
        tensors[f"{path}.weight.nested_quant_map"] = dynamic_levels()
        state["nested_blocksize"] = NESTED_BLOCK
        state["nested_dtype"] = "float32"
        state["nested_offset"] = nested.offset.item()
    text = json.dumps(state).encode()
    tensors[f"{path}{STATE}{codes.kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return tensors


def packed_names(path: str, kind: Kind | Literal["int8"], *, double: bool = False) -> list[str]:
    """Names of the tensors that store the linear `path`."""
    if kind == "int8":
        return [f"{path}.{part}" for part in ("weight", "SCB", "weight_format")]
    parts = ["", ".absmax", ".quant_map"]
    if double:
        parts += [".nested_absmax", ".nested_quant_map"]
    return [f"{path}.weight{part}" for part in parts] + [f"{path}{STATE}{kind}"]


def quantization_config(
    kind: Kind | Literal["int8"],
    *,
    double: bool = False,
    dtype: torch.dtype,
    ignore: Iterable[str],
) -> dict[str, Any]:
    """The `quantization_config` entry of a config.json whose packed linears are all alike.

    double: block maxima of 4-bit floats are quantized, too.
    dtype:  type of the model's weights, which products are computed in.
    ignore: module paths of all linears that are not packed, a tied head included.
    """
    entry: dict[str, Any] = {
        "quant_method": METHOD,
        "load_in_4bit": kind != "int8",
        "load_in_8bit": kind == "int8",
        "llm_int8_skip_modules": sorted(ignore),
    }
    if kind != "int8":
        entry["bnb_4bit_quant_type"] = kind
        entry["bnb_4bit_use_double_quant"] = double
        entry["bnb_4bit_compute_dtype"] = _word(dtype)
        entry["bnb_4bit_quant_storage"] = "uint8"
    return entry


class BitsAndBytes:
    """The packed linears of a checkpoint that bitsandbytes reads, whoever wrote it.

    shapes: path of every packed linear -> shape of its weight in the dense checkpoint.
    """

    def __init__(
        self,
        config: dict[str, Any],
        infos: Mapping[str, TensorInfo],
        load: Load,
    ) -> None:
        """config: parsed config.json. infos: of all stored tensors. load: reads some of them.

        Raises CheckpointError if a linear lacks a part or has one that cannot be read.
        """
        self._transposed = config["model_type"] in TRANSPOSED
        self._names: dict[str, list[str]] = {}
        self._states: dict[str, dict[str, Any]] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        described = [name for name in infos if STATE in name]
        for name, text in load(described).items():
            path = name.partition(STATE)[0]
            state = self._states[path] = json.loads(bytes(text.tolist()))
            names = packed_names(path, state["quant_type"], double="nested_offset" in state)
            self._add(path, names, infos, state["shape"])
            self._check_order(path, infos[f"{path}.weight"])
        for name in infos:
            if name.endswith(".SCB"):
                path = name.removesuffix(".SCB")
                *needed, order = packed_names(path, "int8")
                names = [*needed, order] if order in infos else needed
                shape = infos[needed[0]].shape if needed[0] in infos else (0, 0)
                self._add(path, names, infos, shape)

    def names(self, path: str) -> list[str]:
        """The stored tensors of a linear."""
        return self._names[path]

    def kind(self, path: str) -> dict[str, Any]:
        """How it is stored, in plain values."""
        state = self._states.get(path)
        if state is None:
            return {"kind": "int8"}
        double = "nested_offset" in state
        return {"kind": state["quant_type"], "block": state["blocksize"], "double": double}

    def decode(self, path: str, parts: dict[str, Tensor]) -> Tensor:
        """The weight of a linear as the dense checkpoint has it, (rows, columns) float32.

        parts: at least the tensors of `names`. Not modified.
        """
        weight = parts[f"{path}.weight"]
        if path not in self._states:
            found = IntegerCodes(weight, parts[f"{path}.SCB"], torch.float32).decode()
        else:
            found = self._decode_blocks(path, parts)
        return found.T.contiguous() if self._transposed else found

    def uniform(self, path: str, parts: dict[str, Tensor]) -> None:
        """None, as codes of blocks and rows without zeros are not what is meant by uniform."""

    def _decode_blocks(self, path: str, parts: dict[str, Tensor]) -> Tensor:
        state = self._states[path]
        rows, columns = state["shape"]
        absmax = parts[f"{path}.weight.absmax"]
        if "nested_offset" in state:
            table = parts[f"{path}.weight.nested_quant_map"]
            peaks = parts[f"{path}.weight.nested_absmax"]
            absmax = block_scaled(table[absmax.int()], peaks, state["nested_blocksize"])
            absmax = absmax + state["nested_offset"]
        packed = parts[f"{path}.weight"].flatten().view(torch.uint8)
        codes = torch.stack((packed >> 4, packed & 15), 1).flatten()[: rows * columns]
        table = parts[f"{path}.weight.quant_map"]
        found = block_scaled(table[codes.int()], absmax, state["blocksize"])
        return found.view(rows, columns).to(getattr(torch, state["dtype"])).float()

    def _add(
        self,
        path: str,
        names: list[str],
        infos: Mapping[str, TensorInfo],
        shape: Iterable[int],
    ) -> None:
        for name in names:
            if name not in infos:
                raise CheckpointError(f"`{path}` is packed, but there is no `{name}`")
        rows, columns = shape
        self._names[path] = names
        self.shapes[path] = (columns, rows) if self._transposed else (rows, columns)

    def _check_order(self, path: str, info: TensorInfo) -> None:
        rows, columns = self._states[path]["shape"]
        if info.shape[-1] != 1 or info.nbytes != -(-rows * columns // 2):
            raise CheckpointError(
                f"`{path}.weight` holds its codes in the order of a CPU kernel",
                hint="bitsandbytes reorders weights at the first forward: save the model before",
            )


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
