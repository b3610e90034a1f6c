"""HQQ: uniform grids with zeros that are not whole, found from the weights alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from compresso.kernels.scales import in_parts, row_scale_of, split_rows, storable
from compresso.kernels.sweep import row_slices
from compresso.kernels.tiles import on_each

STEPS = 20
NORM = 0.7  # errors are summed to this power: few large ones count little
BETA = 2.0  # accepts errors from 0.67 steps on, more than rounding makes without clipping


@dataclass(frozen=True)
class AffineCodes:
    """Weights are read as `(code - zero) * scale`, one scale and zero for each group of a row.

    codes: (rows, columns) uint8, from 0 to 2**bits - 1.
    scale: (rows, groups) float32, values that can be stored: see `storable`; never 0.
    zero:  (rows, groups) float32, of either sign, values that `zeros_in` holds exactly or
           `zero_bits`.
    bits:  bits of a code.
    dtype: the type scales and zeros are stored in, and decoded weights are rounded to.
    row_scale: (rows, 1) float32, by `row_scale_of`, if scales are stored in 8 bits.
    zero_bits: of a zero that is stored as a whole number of parts of a code, 2**(bits - zero_bits)
           each, from 0 on; None for zeros in `zeros_in`.
    zero_dtype: the type zeros are stored in, if that is another than `dtype`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    dtype: torch.dtype
    row_scale: Tensor | None = None
    zero_bits: int | None = None
    zero_dtype: torch.dtype | None = None

    @property
    def zeros_in(self) -> torch.dtype:
        """The type that zeros are stored in which are not parts of a code."""
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
            self.codes.split(rows),
            self.scale.split(rows),
            self.zero.split(rows),
            split_rows(self.row_scale, rows),
            strict=True,
        )
        return [
            replace(self, codes=codes, scale=scale, zero=zero, row_scale=row_scale)
            for codes, scale, zero, row_scale in parts
        ]


def quantize(
    weight: Tensor,
    gram: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    scale_dtype: torch.dtype,
    scale_bits: int = 16,
) -> AffineCodes:
    """Span each group and move its zero: the `hqq` method.

    weight:      (rows, columns) float32. Not modified.
    gram:        has no part in this method.
    group_size:  columns sharing a scale and a zero, a divisor of `columns`; -1 for all of them.
    scale_dtype: scales and zeros are rounded to it before weights are, so codes fit what is stored.
    scale_bits:  8 to round scales further, to parts of a scale of their row, and zeros to 8 bits
                 from the smallest code to the largest; zeros are then searched once more.

    Half-quadratic splitting of sum |error|**0.7: a step takes the codes for a zero, splits their
    errors into large ones, which are accepted, and the rest, and centres the rest. Of all steps
    each group keeps the one of least mean absolute error. So no group is worse than plain
    rounding on its span, up to the rounding of scales and zeros to 8 bits.

    A group of zeros, and with scales of `scale_dtype` one of a single value that this holds, decode
    to themselves. Every decoded weight is finite.

    Raises ValueError if `group_size` does not divide the columns.

    Source: Badri and Shaji, "Half-Quadratic Quantization" (2023), in units of a group's scale:
    there, errors are in the units of the weights, and the shrinkage depends on these.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise ValueError(f"{columns} columns do not divide into groups of {size}")
    eight = scale_bits == 8
    store = partial(_in_eight_bits, bits=bits) if eight else partial(_stored, dtype=scale_dtype)
    codes = torch.empty_like(weight, dtype=torch.uint8)
    scale, zero = weight.new_empty(2, rows, columns // size)
    row_scale = weight.new_empty(rows, 1) if eight else None

    def code(here: slice) -> None:
        groups = weight[here].reshape(-1, columns // size, size)
        found = _search(groups, _spans(groups, bits, scale_dtype), bits, store)
        if row_scale is not None:
            row_scale[here] = row_scale_of(
                weight[here], found[0][..., 0], dtype=scale_dtype, max_code=2**bits - 1
            )
            parts = in_parts(found[0], row_scale[here, :, None], least=1)
            found = _search(groups, [(parts, found[1])], bits, store)
        rounded = _codes(groups / found[0], found[1], bits)
        codes[here] = rounded.flatten(1).to(torch.uint8)
        scale[here], zero[here] = found[0][..., 0], found[1][..., 0]

    on_each(code, row_slices(weight), weight.device)
    return AffineCodes(codes, scale, zero, bits, scale_dtype, row_scale, 8 if eight else None)


def _search(
    groups: Tensor,
    starts: Iterable[tuple[Tensor, Tensor]],
    bits: int,
    store: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The scale and the zero, (rows, groups, 1), of least mean absolute error of all steps.

    groups: (rows, groups, size). starts: scales and zeros. store: rounds zeros to those that can
    be stored.
    """
    kept: list[Tensor] = []
    for scale, start in starts:
        scaled, zero = groups / scale, store(start)
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
                zero = store(zero - (error - accepted).mean(-1, keepdim=True))
    return kept[1], kept[2]


def _spans(groups: Tensor, bits: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Two grids to start from: scale and zero, each (rows, groups, 1).

    They span the group and 0, and the group alone. The first keeps zeros small where a group is
    all but constant, and a large zero would lose its digits, or be infinite, in `dtype`.
    """
    max_code = 2**bits - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    for ends in ((low.clamp(max=0), high.clamp(min=0)), (low, high)):
        # Each end on its own, because their difference can be infinite.
        span = ends[1] / max_code - ends[0] / max_code
        # A single value is one step away from 0.
        span = torch.where(span > 0, span, ends[1].abs())
        scale = storable(torch.where(span > 0, span, 1.0), dtype=dtype, max_code=max_code)
        yield scale, -ends[0] / scale


def _codes(scaled: Tensor, zero: Tensor, bits: int) -> Tensor:
    return scaled.add(zero).round_().clamp_(0, 2**bits - 1)


def _stored(zero: Tensor, *, dtype: torch.dtype) -> Tensor:
    return zero.to(dtype).to(zero.dtype)


def _in_eight_bits(zero: Tensor, *, bits: int) -> Tensor:
    part = 2.0 ** (bits - 8)
    return (zero / part).round_().clamp_(0, 2**bits / part - 1) * part
