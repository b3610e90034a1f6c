"""HQQ: uniform grids with zeros that are not whole, found from the weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.kernels.grid import storable
from compresso.kernels.sweep import row_slices

STEPS = 20
NORM = 0.7  # errors are summed to this power: few large ones count little
BETA = 2.0  # accepts errors from 0.67 steps on, more than rounding makes without clipping


@dataclass(frozen=True)
class AffineCodes:
    """Weights are read as `(code - zero) * scale`, one scale and zero for each group of a row.

    codes: (rows, columns) uint8, from 0 to 2**bits - 1.
    scale: (rows, groups) float32, values that `dtype` holds exactly; never 0.
    zero:  (rows, groups) float32, values that `zeros_in` holds exactly; of either sign.
    bits:  bits of a code.
    dtype: the type scales and zeros are stored in, and decoded weights are rounded to.
    zero_dtype: the type zeros are stored in, if that is another.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    dtype: torch.dtype
    zero_dtype: torch.dtype | None = None

    @property
    def zeros_in(self) -> torch.dtype:
        """The type that zeros are stored in."""
        return self.zero_dtype or self.dtype

    def decode(self) -> Tensor:
        """The weights, (rows, columns) float32, equal to what a reader of the stored form gets.

        Computed in float32 and rounded once more, to `dtype`.
        """
        levels = self.codes.view(*self.scale.shape, -1).to(self.scale.dtype)
        weight = levels.sub_(self.zero[..., None]).mul_(self.scale[..., None])
        return weight.view_as(self.codes).to(self.dtype).to(self.scale.dtype)

    def split(self, rows: list[int]) -> list[AffineCodes]:
        """The matrices that so many rows each were stacked from."""
        parts = zip(
            self.codes.split(rows), self.scale.split(rows), self.zero.split(rows), strict=True
        )
        return [AffineCodes(*part, self.bits, self.dtype, self.zero_dtype) for part in parts]


def quantize(
    weight: Tensor,
    gram: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
) -> AffineCodes:
    """Span each group and move its zero: the `hqq` method.

    weight:      (rows, columns) float32. Not modified.
    gram:        has no part in this method.
    group_size:  columns sharing a scale and a zero, a divisor of `columns`; -1 for all of them.
    scale_dtype: scales and zeros are rounded to it before weights are, so codes fit what is stored.

    Half-quadratic splitting of sum |error|**0.7: a step takes the codes for a zero, splits their
    errors into large ones, which are accepted, and the rest, and centres the rest. Of all steps
    each group keeps the one of least mean absolute error. So no group is worse than plain
    rounding on its span.

    A group of zeros, and one of a single value that `scale_dtype` holds, decode to themselves.
    Every decoded weight is finite.

    Raises ValueError if `group_size` does not divide the columns.

    Source: Badri and Shaji, "Half-Quadratic Quantization" (2023), in units of a group's scale:
    there, errors are in the units of the weights, and the shrinkage depends on these.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise ValueError(f"{columns} columns do not divide into groups of {size}")
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scale, zero = weight.new_empty(2, rows, columns // size)
    for here in row_slices(weight):
        groups = weight[here].reshape(-1, columns // size, size)
        best_scale, best_zero = _search(groups, bits, scale_dtype)
        rounded = _codes(groups / best_scale, best_zero, bits)
        codes[here] = rounded.flatten(1).to(torch.uint8)
        scale[here], zero[here] = best_scale[..., 0], best_zero[..., 0]
    return AffineCodes(codes, scale, zero, bits, scale_dtype)


def _search(groups: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scale and the zero, (rows, groups, 1), of least mean absolute error of all steps.

    groups: (rows, groups, size).
    """
    kept: list[Tensor] = []
    for scale, start in _spans(groups, 2**bits - 1, dtype):
        scaled, zero = groups / scale, start
        for step in range(STEPS + 1):
            codes = _codes(scaled, zero, bits)
            error = codes.sub_(zero).neg_().add_(scaled)
            size = error.abs()
            found = [size.mean(-1, keepdim=True).mul_(scale), scale, zero]
            if kept:
                better = found[0] < kept[0]
                found = [
                    torch.where(better, new, old) for new, old in zip(found, kept, strict=True)
                ]
            kept = found
            if step < STEPS:
                accepted = size.sub(size.pow(NORM - 1).div_(BETA)).clamp_(min=0)
                accepted = torch.copysign(accepted, error)
                zero = _stored(zero - (error - accepted).mean(-1, keepdim=True), dtype)
    return kept[1], kept[2]


def _spans(groups: Tensor, max_code: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Two grids to start from: scale and zero, each (rows, groups, 1).

    They span the group and 0, and the group alone. The first keeps zeros small where a group is
    all but constant, and a large zero would lose its digits, or be infinite, in `dtype`.
    """
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    for ends in ((low.clamp(max=0), high.clamp(min=0)), (low, high)):
        # Each end on its own, because their difference can be infinite.
        span = ends[1] / max_code - ends[0] / max_code
        # A single value is one step away from 0.
        span = torch.where(span > 0, span, ends[1].abs())
        scale = storable(torch.where(span > 0, span, 1.0), dtype=dtype, max_code=max_code)
        yield scale, _stored(-ends[0] / scale, dtype)


def _codes(scaled: Tensor, zero: Tensor, bits: int) -> Tensor:
    return scaled.add(zero).round_().clamp_(0, 2**bits - 1)


def _stored(zero: Tensor, dtype: torch.dtype) -> Tensor:
    return zero.to(dtype).to(zero.dtype)
