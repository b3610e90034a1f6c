"""What formats of uniform codes have in common: the form each matrix gets, and its codes in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd
from typing import Protocol

import torch

from compresso.checkpoint.layout import Scheme
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.formats.matrices import Matrix, codes, scheme_of, weight
from compresso.formats.parts import How
from compresso.kernels.grid import Packed, quantize
from compresso.kernels.recast import exact_in, recast
from compresso.models.adapter import ModelAdapter


class Rounding(Protocol):
    """The settings of what is rounded to codes now."""

    @property
    def group_size(self) -> int: ...

    @property
    def symmetric(self) -> bool: ...


def refuse_transposed(adapter: ModelAdapter, name: str) -> None:
    """Raises ConfigError if the linears are (in, out), which a format of that name has not."""
    if adapter.family.transposed:
        raise ConfigError(
            f"the linears of `{adapter.config.model_type}` are stored transposed, which `{name}`"
            " cannot express",
            hint="pass `--format bitsandbytes` or `--format dense`",
        )


def refuse_none(wanted: Mapping[str, Scheme], model: Checkpoint, name: str) -> None:
    """Raises ConfigError if there is nothing to store as codes."""
    if not wanted:
        raise ConfigError(
            f"no linear of `{model.path}` has codes that `{name}` can hold",
            hint="`--bits 4` rounds its weights to nearest levels; `quantize` does it better",
        )


def rounded_as(matrix: Matrix, bits: int | None, settings: Rounding) -> Scheme | None:
    """How a matrix is to be rounded that has no codes; None without bits: it is to stay dense.

    Raises ConfigError if its columns do not divide into groups.
    """
    if bits is None:
        return None
    if settings.group_size != -1 and matrix.columns % settings.group_size:
        raise ConfigError(
            f"`{matrix.path}` has {matrix.columns} columns, which do not divide into groups of"
            f" {settings.group_size}",
            hint="choose a `--group-size` that divides, or -1 for whole rows",
        )
    return Scheme(bits, settings.group_size, settings.symmetric)


def in_one_form(wanted: Mapping[str, Scheme], found: Iterable[Matrix]) -> dict[str, Scheme]:
    """The one scheme that holds all codes, for each: as wide as the widest, in common groups.

    wanted: by path in the checkpoint, at least one. found: these matrices, among others.
    """
    columns = {matrix.path: matrix.columns for matrix in found}
    forms = {*wanted.values()}
    rows = all(scheme.group_size == -1 for scheme in forms)
    sizes = {columns[p] if s.group_size == -1 else s.group_size for p, s in wanted.items()}
    one = Scheme(
        max(scheme.bits for scheme in forms),
        -1 if rows else gcd(*sizes),
        all(scheme.symmetric for scheme in forms),
    )
    return dict.fromkeys(wanted, one)


def own_codes(
    model: Checkpoint, matrix: Matrix, scheme: Scheme, *, dtype: torch.dtype, transposed: bool
) -> tuple[Packed, How]:
    """The codes that a matrix has, or its nearest levels by the scheme if it has none; and which.

    dtype: of the scales that the format stores. transposed: of the model's family.
    """
    if scheme_of(model, matrix.path) is not None:
        own = codes(model, matrix.path)
        assert own is not None
        return own, "repacked" if exact_in(own, dtype) else "rescaled"
    dense = weight(model, matrix, transposed=transposed).float()
    own = quantize(
        dense,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        grid="mse",
        scale_dtype=dtype,
    )
    return own, "rounded"


def in_form(own: Packed, scheme: Scheme, *, dtype: torch.dtype) -> Packed:
    """The same codes by a scheme that holds them, with scales of `dtype`."""
    return recast(
        own,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        dtype=dtype,
    )


def words(scheme: Scheme) -> str:
    """A scheme as tables name it."""
    kind = "symmetric" if scheme.symmetric else "asymmetric"
    group = "row" if scheme.group_size == -1 else str(scheme.group_size)
    return f"int{scheme.bits} {kind} g{group}"
