"""How a quantize run stores the linears it quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from compresso import registry
from compresso.checkpoint import bitsandbytes_layout, coded, layout
from compresso.checkpoint.layout import Scheme
from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.grid import Packed
from compresso.kernels.higgs import VectorCodes
from compresso.kernels.hqq import AffineCodes
from compresso.kernels.normal_float import FloatCodes, IntegerCodes, Kind
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import restructure, structure_of
from compresso.recipe import Step
from compresso.stages.quantize_plan import Plan

Codes = Packed | AffineCodes | VectorCodes | FloatCodes | IntegerCodes
Described = dict[str, Any]  # what config.json has to say about some linears, in plain values


class Layout(Protocol):
    """A form in which codes are stored and loaded."""

    def pack(self, name: str, module: str, codes: Any) -> tuple[dict[str, Tensor], Described]:
        """The tensors that store a linear, and what config.json has to say about it.

        name: of the linear in the checkpoint. module: in transformers.
        """
        ...

    def names(self, name: str) -> list[str]:
        """Names of the tensors that store a linear."""
        ...

    def config(self, config: dict[str, Any], described: Iterable[Described]) -> dict[str, Any]:
        """The config.json of the quantized model. config: of its source. Not modified."""
        ...


@dataclass(frozen=True)
class Dense:
    """The rounded weights, as if nothing had been quantized.

    transposed: dense weights are stored (in, out).
    """

    transposed: bool
    dtype: torch.dtype

    def pack(self, name: str, module: str, codes: Any) -> tuple[dict[str, Tensor], Described]:
        """See `Layout`."""
        weight = codes.decode().to(self.dtype)
        turned = weight.T if self.transposed else weight
        return {f"{name}.weight": turned.contiguous().cpu()}, {}

    def names(self, name: str) -> list[str]:
        """See `Layout`."""
        return [f"{name}.weight"]

    def config(self, config: dict[str, Any], described: Iterable[Described]) -> dict[str, Any]:
        """See `Layout`."""
        return config


@dataclass(frozen=True)
class CompressedTensors:
    """Uniform grids in the layout of compressed-tensors.

    schemes: of every linear, by name in the checkpoint. modules: of every linear, its name in
             transformers. kept: names in transformers of the linears that stay dense.
    """

    schemes: Mapping[str, Scheme]
    modules: Mapping[str, str]
    kept: list[str]
    dtype: torch.dtype

    def pack(self, name: str, module: str, codes: Packed) -> tuple[dict[str, Tensor], Described]:
        """See `Layout`."""
        symmetric = self.schemes[name].symmetric
        return layout.pack(name, codes, self.dtype, symmetric=symmetric), {}

    def names(self, name: str) -> list[str]:
        """See `Layout`."""
        return layout.packed_names(name, self.schemes[name])

    def config(self, config: dict[str, Any], described: Iterable[Described]) -> dict[str, Any]:
        """See `Layout`."""
        schemes = {self.modules[name]: scheme for name, scheme in self.schemes.items()}
        entry = layout.quantization_config(schemes, ignore=self.kept)
        return {**config, "quantization_config": entry}


@dataclass(frozen=True)
class Coded:
    """Compresso's own layout: vector grids, uniform grids with any zeros, and scales in 8 bits.

    symmetric: codes are of uniform grids that are. zero: codes are of others. row_scale: scales are
               in 8 bits.
    """

    transposed: bool
    symmetric: bool
    zero: bool
    row_scale: bool

    def pack(self, name: str, module: str, codes: Codes) -> tuple[dict[str, Tensor], Described]:
        """See `Layout`."""
        assert isinstance(codes, Packed | AffineCodes | VectorCodes)
        options = {"symmetric": self.symmetric}
        described = coded.describe({module: codes}, transposed=self.transposed, **options)
        return coded.pack(name, codes, **options), described

    def names(self, name: str) -> list[str]:
        """See `Layout`."""
        return coded.packed_names(name, zero=self.zero, row_scale=self.row_scale)

    def config(self, config: dict[str, Any], described: Iterable[Described]) -> dict[str, Any]:
        """See `Layout`."""
        said = coded.merge(part for part in described if part)
        return restructure(config, structure_of(config), coded=said)


@dataclass(frozen=True)
class BitsAndBytes:
    """The layouts of bitsandbytes. double: block maxima of 4-bit floats are quantized, too."""

    kind: Kind | Literal["int8"]
    double: bool
    kept: list[str]
    dtype: torch.dtype

    def pack(
        self, name: str, module: str, codes: FloatCodes | IntegerCodes
    ) -> tuple[dict[str, Tensor], Described]:
        """See `Layout`."""
        return bitsandbytes_layout.pack(name, codes), {}

    def names(self, name: str) -> list[str]:
        """See `Layout`."""
        return bitsandbytes_layout.packed_names(name, self.kind, double=self.double)

    def config(self, config: dict[str, Any], described: Iterable[Described]) -> dict[str, Any]:
        """See `Layout`."""
        entry = bitsandbytes_layout.quantization_config(
            self.kind, double=self.double, dtype=self.dtype, ignore=self.kept
        )
        return {**config, "quantization_config": entry}


def make_layout(adapter: ModelAdapter, source: Checkpoint, step: Step, plan: Plan) -> Layout:
    """How the linears of a run are stored.

    Several widths with zeros of their own, and scales in 8 bits, have no form in
    compressed-tensors: they are coded.
    """
    settings, transposed = step.settings, adapter.family.transposed
    if not settings.pack:
        return Dense(transposed, source.dtype)
    packed_as = registry.packed_as(step.method, settings)
    eight = getattr(settings, "scale_bits", None) == 8
    if packed_as == "bitsandbytes":
        kind: Literal["nf4", "int8"] = "nf4" if step.method == "nf4" else "int8"
        return BitsAndBytes(kind, eight, plan.kept, source.dtype)
    symmetric = getattr(settings, "symmetric", False)
    if packed_as == "coded" or (plan.mixed and not symmetric):
        zero = not symmetric and not hasattr(settings, "dimension")
        return Coded(transposed, symmetric=symmetric, zero=zero, row_scale=eight)
    schemes: dict[str, Scheme] = {}
    modules: dict[str, str] = {}
    for index, groups in enumerate(plan.groups):
        for paths, bits in zip(groups, plan.bits[index], strict=True):
            assert bits is not None
            for path in paths:
                name = f"{adapter.block_prefix(index)}{path}"
                schemes[name] = Scheme(bits, settings.group_size, settings.symmetric)
                modules[name] = f"{adapter.module_prefix(index)}{path}"
    if plan.head:
        assert plan.head_bits is not None
        name = adapter.head_tensor.removesuffix(".weight")
        schemes[name] = Scheme(plan.head_bits, settings.group_size, settings.symmetric)
        modules[name] = adapter.family.head
    return CompressedTensors(schemes, modules, plan.kept, source.dtype)
