"""Codes in the `pack-quantized` layout of compressed-tensors, which transformers and vLLM read.

What loads depends on the versions (each case was run with compressed-tensors 0.17.0 and 0.20.0):

- Codes in one form, symmetric or not: `"dequantize": true`, which makes transformers decode while
  it loads. Only so can it have an adapter put on at once, and an embedding of codes.
- Symmetric codes in several forms: without it, decoded at the first forward pass.
- Asymmetric codes in several forms load with no version from 0.18 on. They are refused, unless
  `uniform` says to store all in one form that holds them all.
- 2, 4 and 8 bits are the same bytes for every version; 3 bits need 0.18 or later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from compresso.checkpoint import layout
from compresso.checkpoint.layout import METHOD, Scheme
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.export_settings import CompressedTensorsSettings
from compresso.formats.matrices import Matrix, matrices, scheme_of
from compresso.formats.parts import (
    Parts,
    Stored,
    corrections,
    dense_config,
    refuse_inexact_merge,
    write_parts,
    written,
)
from compresso.formats.recoding import (
    in_form,
    in_one_form,
    own_codes,
    refuse_none,
    refuse_transposed,
    rounded_as,
    words,
)
from compresso.formats.writing import Export, Written
from compresso.models.adapter import ModelAdapter
from compresso.models.unfolded import ENTRY

PACKAGES = {"compressed_tensors": "'compresso-llm[packed]'"}
SAME_IN_ALL = (2, 4, 8)  # bits


@dataclass(frozen=True)
class Coding:
    """How the matrices of a model are stored as codes.

    model: that is exported. adapter: its architecture. found: all of its matrices.
    schemes: of those that are codes, by path in the checkpoint.
    """

    model: Checkpoint
    adapter: ModelAdapter
    found: list[Matrix]
    schemes: dict[str, Scheme]

    @classmethod
    def choose(
        cls, model: Checkpoint, adapter: ModelAdapter, settings: CompressedTensorsSettings
    ) -> Self:
        """The forms that hold the codes it has, and such as were asked for.

        Raises ConfigError if there are none, or what is asked for does not load.
        """
        refuse_transposed(adapter, METHOD)
        found = matrices(model, adapter)
        refuse_inexact_merge(model, found)
        wanted = _wanted(model, adapter, found, settings)
        return cls(model, adapter, found, _resolve(wanted, found, uniform=settings.uniform))

    @property
    def oldest(self) -> str:
        """The first version that loads it."""
        return "0.15" if all(s.bits in SAME_IN_ALL for s in self.schemes.values()) else "0.18"

    def pack(self, matrix: Matrix) -> Stored | None:
        """What to store for a matrix; None if it stays dense."""
        scheme = self.schemes.get(matrix.path)
        if scheme is None:
            return None
        dtype = self.model.dtype
        turned = self.adapter.family.transposed
        own, how = own_codes(self.model, matrix, scheme, dtype=dtype, transposed=turned)
        packed = in_form(own, scheme, dtype=dtype)
        tensors = layout.pack(matrix.path, packed, dtype, symmetric=scheme.symmetric)
        return Stored(tensors, words(scheme), how)

    def entry(self) -> dict[str, Any]:
        """The `quantization_config` of the config.json."""
        by_module = {m.module: self.schemes[m.path] for m in self.found if m.path in self.schemes}
        kept = {
            m.module for m in self.found if m.part != "embedding" and m.path not in self.schemes
        }
        if self.adapter.tied:
            kept.add(self.adapter.family.head)
        entry = layout.quantization_config(by_module, ignore=kept)
        # Neither is of the class `Linear` for every reader.
        named = [m.module for m in self.found if m.part != "linear" and m.path in self.schemes]
        if entry.get("dequantize"):
            entry["config_groups"]["group_0"]["targets"] += named
        return entry


def write(export: Export) -> Written:
    """The codes that the model has where the layout holds them exactly, others rounded if asked."""
    settings: CompressedTensorsSettings = export.settings
    model = export.stock if settings.structure == "stock" else export.own
    adapter = export.open(model)
    coding = Coding.choose(model, adapter, settings)
    parts = write_parts(export, model, adapter, coding.pack)
    factors = corrections(export, model, adapter)
    config = dense_config(model) | {ENTRY: coding.entry()}
    describe(export, coding, parts, corrected=bool(factors))
    return written(parts, model, adapter, config, packages=PACKAGES, corrected=factors)


def describe(export: Export, coding: Coding, parts: Parts, *, corrected: bool) -> None:
    """Say in the report which versions load it, and what users may want to act on.

    corrected: whether corrections lie beside it.
    """
    report = export.report
    if corrected and not coding.entry().get("dequantize"):
        report.warnings.append(
            "PEFT can put the adapter on only after the loaded model has run once, on any token:"
            " with codes of several forms, its weights come with the first forward pass"
        )
    if dense := sum(row["weights"] for row in parts.rows if row["stored"] == "decoded"):
        report.warnings.append(
            f"{dense:,} weights are stored dense, as `{METHOD}` has no form for their codes:"
            " `--bits` rounds them anew"
        )
    report.summary["loads_with"] = f"{METHOD} {coding.oldest} or later"


def _wanted(
    model: Checkpoint,
    adapter: ModelAdapter,
    found: list[Matrix],
    settings: CompressedTensorsSettings,
) -> dict[str, Scheme]:
    """How every matrix that is to be codes is stored best, by path in the checkpoint."""
    asked = {
        "linear": settings.bits,
        "head": settings.lm_head_bits,
        "embedding": settings.embedding_bits,
    }
    if settings.lm_head_bits is not None and adapter.tied:
        raise ConfigError(
            "the output head shares its weights with the embedding",
            hint="pass `--embedding-bits` in place of `--lm-head-bits`",
        )
    wanted: dict[str, Scheme] = {}
    for matrix in found:
        scheme = scheme_of(model, matrix.path)
        if scheme is None:
            scheme = rounded_as(matrix, asked[matrix.part], settings)
        if scheme is not None:
            wanted[matrix.path] = scheme
    refuse_none(wanted, model, METHOD)
    return wanted


def _resolve(
    wanted: Mapping[str, Scheme], found: list[Matrix], *, uniform: bool
) -> dict[str, Scheme]:
    """The schemes that are stored: such that the checkpoint loads. Raises ConfigError if none do.

    Symmetric codes are stored with their zeros where that is all that sets them apart.
    """
    forms = {*wanted.values()}
    alike = len({(scheme.bits, scheme.group_size) for scheme in forms}) == 1
    if alike or uniform:
        return in_one_form(wanted, found)
    several = f"the codes come in {len(forms)} forms"
    if not all(scheme.symmetric for scheme in forms):
        raise ConfigError(
            f"{several}, some of them asymmetric, which `{METHOD}` 0.18 and later cannot load",
            hint="`--uniform` stores all in the widest; or export `auto-round`",
        )
    if any(matrix.part == "embedding" and matrix.path in wanted for matrix in found):
        raise ConfigError(
            f"{several}, and so the embedding cannot be stored as codes",
            hint="`--uniform` stores all in the widest; or leave out `--embedding-bits`",
        )
    return dict(wanted)
