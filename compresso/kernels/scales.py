"""What the scales of groups are stored as: numbers of a type, or 8 bits each and a number a row.

In 8 bits they are parts of the scale of their row, so that a row needs no other. In the bundled
model's weights, that adds under 0.02 % to the squared error of 2-bit codes and under 0.3 % to that
of 4-bit ones, in groups of 16; in cubes of normal weights, 0.2 % and 1.6 %.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PARTS = 128  # of the scale of a row: a power of two, so that a part of it is exact
MOST = PARTS - 1  # parts in the largest scale of a group
LEAST = 2.0**-119  # scale of a row: one part is still a normal number in float32


def storable(
    scale: Tensor, *, dtype: torch.dtype, max_code: int, row_scale: Tensor | None = None
) -> Tensor:
    """The nearest scales that can be stored, kept from 0 and from decoding to infinity.

    scale:     of groups, float32, of either sign.
    row_scale: of the same rows, in a shape that broadcasts, where scales are stored as parts of it;
               None where they are stored in `dtype`.
    """
    if row_scale is not None:
        found = in_parts(scale.abs(), row_scale, least=1)
    else:
        info = torch.finfo(dtype)
        least, most = info.smallest_normal * info.eps, info.max * (1 - info.eps) / max_code
        found = scale.abs().clamp(least, most).to(dtype).to(scale.dtype)
    return torch.copysign(found, scale)


def row_scale_of(
    weight: Tensor, scale: Tensor, *, dtype: torch.dtype, max_code: int = 1, room: float = 1.0
) -> Tensor:
    """Scales of rows, for scales of groups that are stored in 8 bits, as parts of them.

    weight:   (rows, columns) float32. Not modified. The scale of a group of zeros has no say.
    scale:    (rows, groups) float32. Not modified.
    dtype:    the type that the scales of rows are stored in.
    max_code: times this, no scale of a group becomes infinite in `dtype`.
    room:     how many times the largest scale of its row a scale can become.

    Returns (rows, 1) float32, above 0.
    """
    low, high = torch.aminmax(weight.reshape(*scale.shape, -1), dim=2)
    peak = torch.where((low != 0) | (high != 0), scale.abs(), 0.0).amax(1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0).clamp(min=LEAST)
    return storable(peak * (room * PARTS / MOST), dtype=dtype, max_code=max_code)


def in_parts(scale: Tensor, row_scale: Tensor, *, least: int = 0) -> Tensor:
    """The nearest scales of `least` to MOST parts of those of their rows."""
    part = row_scale / PARTS
    return (scale / part).round_().clamp_(least, MOST).mul_(part)


def split_rows(values: Tensor | None, rows: list[int]) -> Sequence[Tensor | None]:
    """Values of rows, as tensors of so many rows each; for None as many Nones."""
    return [None] * len(rows) if values is None else values.split(rows)
