"""4-bit floats and 8-bit integers as bitsandbytes stores them, for transformers.

The tensors are written straight from the weights: no model is loaded for it. The first forward pass
on a CPU puts the codes of a loaded model in another order, and what is saved after that is wrong
without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compresso.checkpoint.bitsandbytes_layout import METHOD, pack, quantization_config
from compresso.checkpoint.packings import method_of
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.export_settings import BitsAndBytesSettings
from compresso.formats.matrices import Matrix, affine, corrected, matrices, weight
from compresso.formats.parts import (
    How,
    Stored,
    corrections,
    dense_config,
    refuse_inexact_merge,
    write_parts,
    written,
)
from compresso.formats.writing import Export, Written
from compresso.kernels.grid import Packed
from compresso.kernels.normal_float import FRACTION, IntegerCodes, quantize, quantize_rows
from compresso.models.adapter import ModelAdapter
from compresso.models.unfolded import ENTRY

PACKAGES = {"bitsandbytes": "'compresso-llm[bitsandbytes]'"}


def write(export: Export) -> Written:
    """Every linear of the blocks rounded to the format, or as it is if it is in that already."""
    settings: BitsAndBytesSettings = export.settings
    model = export.stock if settings.structure == "stock" else export.own
    adapter = export.open(model)
    found = matrices(model, adapter)
    refuse_inexact_merge(model, found)
    rounding = Rounding(model, adapter, settings)
    for matrix in found:
        rounding.check(matrix)
    parts = write_parts(export, model, adapter, rounding.pack)
    kept = {module for module in parts.kept if module != adapter.family.embedding}
    if adapter.tied:
        kept.add(adapter.family.head)
    config = dense_config(model)
    config[ENTRY] = quantization_config(
        settings.kind, double=settings.double, dtype=model.dtype, ignore=kept
    )
    return written(
        parts,
        model,
        adapter,
        config,
        packages=PACKAGES,
        corrected=corrections(export, model, adapter),
    )


@dataclass(frozen=True)
class Rounding:
    """How the matrices of a model are stored in a form of bitsandbytes."""

    model: Checkpoint
    adapter: ModelAdapter
    settings: BitsAndBytesSettings

    def check(self, matrix: Matrix) -> None:
        """Raises ConfigError if a matrix of a block cannot be stored so, or not without loss."""
        how, settings = self._how(matrix), self.settings
        if how is None:
            return
        if settings.kind != "int8" and matrix.columns % settings.group_size:
            raise ConfigError(
                f"`{matrix.path}` has {matrix.columns} columns, which blocks of"
                f" {settings.group_size} do not divide: bitsandbytes decodes such a matrix wrongly",
                hint="choose a `--group-size` that divides, or `--kind int8`",
            )
        again = matrix.path in self.model.packing.shapes and how == "rounded"
        if again and not settings.requantize:
            raise ConfigError(
                f"`{matrix.path}` has codes of another kind, which `{settings.kind}` cannot hold"
                " exactly",
                hint="export the original, or a format that holds them (`compressed-tensors`,"
                " `gptq`, `auto-round`, `dense`); `--requantize` rounds a second time",
            )

    def pack(self, matrix: Matrix) -> Stored | None:
        """What is stored for a matrix; None for one that stays dense."""
        how, settings = self._how(matrix), self.settings
        if how is None:
            return None
        if how == "copied":
            tensors = self.model.load(self.model.packing.names(matrix.path))
            return Stored(tensors, self._words(), "repacked")
        if how == "repacked":
            return Stored(pack(matrix.path, self._rows(matrix)), self._words(), how)
        turned = self.adapter.family.transposed
        dense = weight(self.model, matrix, transposed=turned).float()
        if settings.kind == "int8":
            found = pack(matrix.path, quantize_rows(dense, scale_dtype=self.model.dtype))
        else:
            codes = quantize(
                dense,
                group_size=settings.group_size,
                scale_dtype=self.model.dtype,
                scale_bits=8 if settings.double else None,
                kind=settings.kind,
            )
            found = pack(matrix.path, codes)
        return Stored(found, self._words(), "rounded")

    def _how(self, matrix: Matrix) -> How | None:
        """As it is stored, `repacked` from codes by row, or `rounded`; None if it stays dense."""
        packed = method_of(self.model.config) == METHOD and (
            matrix.path in self.model.packing.shapes and not corrected(self.model, matrix.path)
        )
        if packed and self._same(matrix):
            return "copied"
        if matrix.part != "linear":
            return None
        if self.settings.kind == "int8" and self._by_row(matrix):
            return "repacked"
        return "rounded"

    def _same(self, matrix: Matrix) -> bool:
        """Whether it is stored in just the form that is asked for."""
        kind, settings = self.model.packing.kind(matrix.path), self.settings
        if settings.kind == "int8":
            return kind["kind"] == "int8"
        asked = {"kind": settings.kind, "block": settings.group_size, "double": settings.double}
        return kind == asked

    def _by_row(self, matrix: Matrix) -> bool:
        """Whether its codes are of 8 bits, symmetric, by row: all but int8 already."""
        if matrix.path not in self.model.packing.shapes:
            return False
        kind = self.model.packing.kind(matrix.path)
        return (
            kind.get("bits") == 8
            and kind.get("group_size") in (-1, matrix.columns)
            and kind.get("symmetric", kind.get("zero_bits") == 0)
            and not corrected(self.model, matrix.path)
        )

    def _rows(self, matrix: Matrix) -> IntegerCodes:
        found = affine(self.model, matrix.path)
        assert found is not None
        scale = found.grid.scale if isinstance(found, Packed) else found.scale
        codes = (found.codes.int() - 128).to(torch.int8)
        return IntegerCodes(codes, scale[:, 0] / FRACTION, self.model.dtype)

    def _words(self) -> str:
        settings = self.settings
        if settings.kind == "int8":
            return "int8 by row"
        return f"{settings.kind} b{settings.group_size}{' double' if settings.double else ''}"
