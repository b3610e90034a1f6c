"""What the formats that GPTQ's layout serves have in common: which linears are codes, and which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from compresso.checkpoint import gptq_layout
from compresso.checkpoint.gptq_layout import WORD
from compresso.checkpoint.layout import Scheme
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.export_settings import CodesSettings
from compresso.formats.matrices import Matrix, matrices, scheme_of
from compresso.formats.parts import Parts, Stored, refuse_inexact_merge, write_parts
from compresso.formats.recoding import (
    in_form,
    in_one_form,
    own_codes,
    refuse_none,
    refuse_transposed,
    rounded_as,
    words,
)
from compresso.formats.writing import Export
from compresso.models.adapter import ModelAdapter

# Share of the largest logit. The kernels multiply in bfloat16 or float16, and round weights to it.
TOLERANCE = 0.08
HALF = torch.float16
LEAST, MOST = torch.finfo(HALF).smallest_normal, torch.finfo(HALF).max


@dataclass(frozen=True)
class Uniform:
    """A model that is to be written in GPTQ's layout.

    schemes: of every matrix that is stored as codes, by path in the checkpoint, as it is stored.
    found:   all matrices. format: its name, for messages.
    """

    format: str
    model: Checkpoint
    adapter: ModelAdapter
    found: list[Matrix]
    schemes: dict[str, Scheme]

    def by_module(self) -> dict[str, Scheme]:
        """The schemes by path in transformers."""
        return {m.module: self.schemes[m.path] for m in self.found if m.path in self.schemes}

    def dense(self) -> list[str]:
        """Paths in transformers of the linears in blocks that stay dense."""
        linears = [m for m in self.found if m.part == "linear"]
        return [m.module for m in linears if m.path not in self.schemes]

    def write(self, export: Export, *, less_one: bool, ordered: bool) -> Parts:
        """Commit all parts. The options are those of `gptq_layout.pack`."""
        pack = partial(self._pack, less_one=less_one, ordered=ordered)
        parts = write_parts(export, self.model, self.adapter, pack)
        for row in parts.rows:
            if row["stored"] == "decoded":
                export.report.warnings.append(
                    f"{row['weights']:,} weights are stored dense, as `{self.format}` has no form"
                    " for their codes"
                )
        return parts

    def _pack(self, matrix: Matrix, *, less_one: bool, ordered: bool) -> Stored | None:
        scheme = self.schemes.get(matrix.path)
        if scheme is None:
            return None
        turned = self.adapter.family.transposed
        own, how = own_codes(self.model, matrix, scheme, dtype=HALF, transposed=turned)
        packed = in_form(own, scheme, dtype=HALF)
        scale = own.grid.scale.abs()
        if how == "rescaled" and (scale.min() < LEAST or scale.max() > MOST):
            raise ConfigError(
                f"`{matrix.path}` has scales that float16 does not hold",
                hint="pass `--format compressed-tensors`, which stores them in the model's type",
            )
        tensors = gptq_layout.pack(matrix.path, packed, less_one=less_one, ordered=ordered)
        return Stored(tensors, words(scheme), how)


def plan(
    export: Export, name: str, *, head: bool, groups: Iterable[int] | None, one: bool
) -> Uniform:
    """Decide what of a model is stored as codes, and refuse what cannot be, before any work.

    name:   of the format. head: whether it can hold a head of codes.
    groups: the sizes of groups that it can hold; None for any.
    one:    whether all codes must come in one form.

    Raises ConfigError if there is nothing to store as codes, or no form that holds them.
    """
    settings: CodesSettings = export.settings
    model = export.stock if settings.structure == "stock" else export.own
    adapter = export.open(model)
    refuse_transposed(adapter, name)
    found = matrices(model, adapter)
    refuse_inexact_merge(model, found)
    wanted: dict[str, Scheme] = {}
    odd: list[str] = []
    for matrix in found:
        if matrix.part == "embedding" or (matrix.part == "head" and not head):
            continue
        bits = settings.bits if matrix.part == "linear" else getattr(settings, "lm_head_bits", None)
        if matrix.rows % WORD or matrix.columns % WORD:
            odd += [matrix.path] * (bits is not None)
            continue
        scheme = scheme_of(model, matrix.path) or rounded_as(matrix, bits, settings)
        if scheme is not None:
            wanted[matrix.path] = scheme
    refuse_none(wanted, model, name)
    if odd:
        export.report.warnings.append(
            f"{len(odd)} linears stay dense, as {WORD} does not divide their rows and columns,"
            f" first `{odd[0]}`"
        )
    if groups is not None:
        wanted = {path: _regrouped(path, own, name, groups) for path, own in wanted.items()}
    if one:
        if not getattr(settings, "uniform", False):
            _refuse_widths(wanted, name)
        wanted = in_one_form(wanted, found)
    return Uniform(name, model, adapter, found, wanted)


def _regrouped(path: str, scheme: Scheme, name: str, groups: Iterable[int]) -> Scheme:
    """The scheme with the largest groups that the format can hold and that hold its codes."""
    size = scheme.group_size
    if size in groups:
        return scheme
    fitting = [group for group in groups if group > 0 and size % group == 0]
    if size == -1 or not fitting:
        raise ConfigError(
            f"`{path}` has codes in groups of {size}, which `{name}` cannot hold",
            hint="pass `--format auto-round` or `--format compressed-tensors`, which can",
        )
    return Scheme(scheme.bits, max(fitting), scheme.symmetric)


def _refuse_widths(wanted: Mapping[str, Scheme], name: str) -> None:
    """Raises ConfigError if some codes would have to become wider for one form."""
    widths = {scheme.bits for scheme in wanted.values()}
    if len(widths) > 1:
        raise ConfigError(
            f"the codes have {_listed(widths)} bits, but `{name}` loads with one width for all",
            hint="pass `--format auto-round`, which holds them as they are; or `--uniform`, which"
            " stores all in the widest",
        )


def _listed(values: Iterable[int]) -> str:
    *first, last = map(str, sorted(values))
    return f"{', '.join(first)} and {last}"
