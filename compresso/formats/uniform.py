"""What the formats that GPTQ's layout serves have in common: which linears are codes, and which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd

import torch
from torch import Tensor

from compresso.checkpoint import gptq_layout
from compresso.checkpoint.gptq_layout import WORD
from compresso.checkpoint.layout import Scheme
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.export_settings import CodesSettings
from compresso.formats.matrices import Matrix, codes, matrices, scheme_of, weight
from compresso.formats.parts import How, Parts, Stored, refuse_inexact_merge, write_parts
from compresso.formats.writing import Export
from compresso.kernels.grid import Packed, quantize
from compresso.kernels.recast import exact_in, recast
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
        if scheme_of(self.model, matrix.path) is None:
            turned = self.adapter.family.transposed
            own = rounded(weight(self.model, matrix, transposed=turned), scheme)
            how: How = "rounded"
        else:
            found = codes(self.model, matrix.path)
            assert found is not None
            own, how = found, "repacked" if exact_in(found, HALF) else "rescaled"
        packed = recast(
            own,
            bits=scheme.bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            dtype=HALF,
        )
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
    if adapter.family.transposed:
        raise ConfigError(
            f"the linears of `{adapter.config.model_type}` are stored transposed, which `{name}`"
            " cannot express",
            hint="pass `--format dense`",
        )
    found = matrices(model, adapter)
    refuse_inexact_merge(model, found)
    wanted: dict[str, Scheme] = {}
    for matrix in found:
        if matrix.part == "embedding" or (matrix.part == "head" and not head):
            continue
        if matrix.rows % WORD or matrix.columns % WORD:
            continue
        scheme = scheme_of(model, matrix.path) or _asked(matrix, settings)
        if scheme is not None:
            wanted[matrix.path] = scheme
    if not wanted:
        raise ConfigError(
            f"no linear of `{model.path}` has codes that `{name}` can hold",
            hint="`--bits 4` rounds its weights to nearest levels; `quantize` does it better",
        )
    if groups is not None:
        wanted = {path: _regrouped(path, own, name, groups) for path, own in wanted.items()}
    if one:
        columns = {matrix.path: matrix.columns for matrix in found}
        wanted = _one_form(wanted, columns, name, widen=bool(getattr(settings, "uniform", False)))
    return Uniform(name, model, adapter, found, wanted)


def rounded(dense: Tensor, scheme: Scheme) -> Packed:
    """A dense weight, (rows, columns), as its nearest levels, with scales that float16 holds."""
    return quantize(
        dense.float(),
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        grid="mse",
        scale_dtype=HALF,
    )


def words(scheme: Scheme) -> str:
    """A scheme as tables name it."""
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    group = "row" if scheme.group_size == -1 else str(scheme.group_size)
    return f"int{scheme.bits} {kind} g{group}"


def _asked(matrix: Matrix, settings: CodesSettings) -> Scheme | None:
    """How a matrix is to be rounded that has no codes; None if it is to stay dense."""
    bits = settings.bits if matrix.part == "linear" else getattr(settings, "lm_head_bits", None)
    if bits is None:
        return None
    if settings.group_size != -1 and matrix.columns % settings.group_size:
        raise ConfigError(
            f"`{matrix.path}` has {matrix.columns} columns, which do not divide into groups of"
            f" {settings.group_size}",
            hint="choose a `--group-size` that divides, or -1 for whole rows",
        )
    return Scheme(bits, settings.group_size, settings.symmetric)


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


def _one_form(
    wanted: Mapping[str, Scheme], columns: Mapping[str, int], name: str, *, widen: bool
) -> dict[str, Scheme]:
    """The one scheme that holds them all, for each.

    widen: also where some codes become wider for it. Raises ConfigError if that is not allowed.
    """
    forms = {*wanted.values()}
    if len({scheme.bits for scheme in forms}) > 1 and not widen:
        raise ConfigError(
            f"the codes have {_listed({scheme.bits for scheme in forms})} bits, but `{name}` loads"
            " with one width for all",
            hint="pass `--format auto-round`, which holds them as they are; or `--uniform`, which"
            " stores all in the widest",
        )
    rows = all(scheme.group_size == -1 for scheme in forms)
    sizes = {columns[p] if s.group_size == -1 else s.group_size for p, s in wanted.items()}
    one = Scheme(
        max(scheme.bits for scheme in forms),
        -1 if rows else gcd(*sizes),
        all(scheme.symmetric for scheme in forms),
    )
    return dict.fromkeys(wanted, one)


def _listed(values: Iterable[int]) -> str:
    *first, last = map(str, sorted(values))
    return f"{', '.join(first)} and {last}"
