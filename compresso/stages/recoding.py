"""Quantize linears again in the form in which a checkpoint stores them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from compresso.checkpoint import bitsandbytes_layout, coded, layout
from compresso.checkpoint.bitsandbytes_layout import BitsAndBytes
from compresso.checkpoint.coded_kinds import Form
from compresso.checkpoint.packings import CompressedTensors
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.kernels import grid, higgs, hqq, normal_float


@dataclass(frozen=True)
class Recoder:
    """How a stored linear is quantized anew, so that config.json stays as it is.

    quantize: gives the codes of a matrix, (rows, columns) float32.
    pack:     gives the tensors that store them, by name.
    """

    quantize: Callable[[Tensor], Any]
    pack: Callable[[Any], dict[str, Tensor]]


def recoder_of(source: Checkpoint, path: str) -> Recoder:
    """For a packed linear, by path in the checkpoint.

    Uniform grids are fitted for the least squared error, whatever found those that are stored.

    Raises ConfigError if its form is not one that can be chosen again.
    """
    packing = source.packing
    if isinstance(packing, CompressedTensors):
        scheme = packing.schemes[path]
        uniform = partial(
            grid.quantize,
            bits=scheme.bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            grid="mse",
            scale_dtype=source.dtype,
        )
        return Recoder(
            uniform,
            lambda codes: layout.pack(path, codes, source.dtype, symmetric=scheme.symmetric),
        )
    if isinstance(packing, BitsAndBytes):
        kind = packing.kind(path)
        if kind["kind"] == "int8":
            raise ConfigError(
                f"`{path}` is stored in 8 bits by bitsandbytes, which leave nothing to correct",
                hint="quantize to fewer bits",
            )
        floats = partial(
            normal_float.quantize,
            group_size=kind["block"],
            scale_bits=8 if kind["double"] else 32,
            scale_dtype=source.dtype,
            kind=kind["kind"],
        )
        return Recoder(floats, lambda codes: bitsandbytes_layout.pack(path, codes))
    return _coded(source, path)


def _coded(source: Checkpoint, path: str) -> Recoder:
    plan = coded.coding_of(source.config)
    assert plan is not None
    module = layout.module_of(path, plan[coded.CODED])
    name = plan[coded.CODED][module]
    kind: dict[str, Any] = plan[coded.KINDS][name]
    form = Form.read(name, kind)
    scales: dict[str, Any] = {"scale_dtype": form.dtype, "scale_bits": form.scale_bits}
    if kind["kind"] == "vector":
        bits = form.bits // form.weights
        quantize: Callable[[Tensor], Any] = partial(
            higgs.quantize, bits=bits, dimension=form.weights, block=form.group, fit="mse", **scales
        )
        return Recoder(quantize, lambda codes: coded.pack(path, codes))
    scales |= {"bits": form.bits, "group_size": form.group}
    if form.zero_bits in (0, form.bits):
        symmetric = form.zero_bits == 0
        quantize = partial(grid.quantize, symmetric=symmetric, grid="mse", **scales)
        return Recoder(quantize, lambda codes: coded.pack(path, codes, symmetric=symmetric))
    return Recoder(partial(hqq.quantize, **scales), lambda codes: coded.pack(path, codes))
