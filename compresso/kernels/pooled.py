"""Corrections that are constant within each quantization group, and so fit into its zero."""

from __future__ import annotations

import torch
from torch import Tensor

from compresso.errors import NumericalError
from compresso.kernels.grid import Packed
from compresso.kernels.hqq import AffineCodes


def pool(inputs: Tensor, group_size: int) -> Tensor:
    """The sum of every group of neighbouring inputs: (..., columns) -> (..., groups).

    Raises ValueError if `group_size` does not divide the columns.
    """
    columns = inputs.shape[-1]
    if columns % group_size:
        raise ValueError(f"{columns} columns do not divide into groups of {group_size}")
    return inputs.unflatten(-1, (-1, group_size)).sum(-1)


def spread(down: Tensor, group_size: int) -> Tensor:
    """The same factor for inputs that are not pooled: (rank, groups) -> (rank, columns).

    `spread(down, g) @ x` is `down @ pool(x, g)`.
    """
    return down.repeat_interleave(group_size, dim=-1)


def merge_pooled(
    codes: Packed | AffineCodes,
    up: Tensor,
    down: Tensor,
    *,
    zero_dtype: torch.dtype = torch.float32,
) -> AffineCodes:
    """Codes that mean W + up @ spread(down), where `codes` mean W. They stay what they are.

    codes:      (rows, columns), uniform, in groups of columns that share a scale. Not modified.
    up:         (rows, rank) float32. Not modified.
    down:       (rank, groups) float32: acts on the sums of the inputs of each group. Not modified.
    zero_dtype: type that the new zeros are stored in and rounded to.

    A weight is `(code - zero) * scale`, so what is added to all weights of a group moves its zero
    by as much less, over its scale: zero' = zero - (up @ down) / scale. That is exact but for the
    rounding of zeros to `zero_dtype`, and of decoded weights to the type they are decoded to, as
    ever. An error of a zero is the same for all weights of its group, so it does not average out
    over them as those of weights do: a zero needs more digits than a weight.

    Raises ValueError if the factors do not fit the codes, NumericalError if a zero is not finite in
    `zero_dtype`.

    Source: Xu et al., arXiv:2309.14717 (QA-LoRA), with sums in place of means.
    """
    grid = codes.grid if isinstance(codes, Packed) else codes
    rows, groups = grid.scale.shape
    if up.shape[0] != rows or down.shape[1] != groups or up.shape[1] != down.shape[0]:
        raise ValueError(
            f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} do not fit {rows} rows of"
            f" {groups} groups"
        )
    zero = (grid.zero - up.float() @ down.float() / grid.scale).to(zero_dtype)
    if not bool(torch.isfinite(zero).all()):
        raise NumericalError(
            f"a correction merged into a zero is not finite in {zero_dtype}",
            hint="store zeros as float32",
        )
    return AffineCodes(
        codes.codes,
        grid.scale,
        zero.float(),
        grid.bits,
        grid.dtype,
        row_scale=grid.row_scale,
        zero_dtype=zero_dtype,
    )
