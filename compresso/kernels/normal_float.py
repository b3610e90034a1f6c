"""The number formats of bitsandbytes: 4-bit floats in blocks, and 8-bit integers by row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

NESTED_BLOCK = 256  # block maxima that share a maximum of their own, if these are quantized too
LEAST_PEAK = 1e-38  # what a block of zeros is divided by
FRACTION = 7.874015718698502e-3  # 1 / 127, as bitsandbytes has it

# Normal quantiles, Dettmers et al., arXiv:2305.14314, appendix E.
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# A sign bit, two of exponent and one of mantissa, times 12.
FP4_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)

Kind = Literal["nf4", "fp4"]


def levels(kind: Kind) -> Tensor:
    """What the 16 codes of a format stand for, (16,) float32 in [-1, 1], in order of the codes."""
    if kind == "nf4":
        return torch.tensor(NF4)
    half = torch.tensor(FP4_TWELFTHS) / 12
    return torch.cat((half, -half))


def dynamic_levels() -> Tensor:
    """What the 256 codes of quantized block maxima stand for, (256,) float32, ascending.

    Seven powers of ten, each with a linear range of twice as many levels as the one below it.

    Source: Dettmers, arXiv:1511.04561, with the levels that bitsandbytes has.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1)
        means = (bounds[:-1] + bounds[1:]) / 2
        for sign in (1, -1):
            found += (sign * 10 ** (exponent - 6) * means).tolist()
    return torch.tensor(sorted(found))


@dataclass(frozen=True)
class Nested:
    """Block maxima, themselves quantized in blocks of NESTED_BLOCK.

    codes:  (blocks,) uint8, of `dynamic_levels`.
    absmax: (ceil(blocks / NESTED_BLOCK),) float32, the largest of each block less the offset.
    offset: () float32, the mean of all.
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    def decode(self) -> Tensor:
        """The block maxima, (blocks,) float32."""
        found = block_scaled(
            dynamic_levels().to(self.absmax.device)[self.codes.int()], self.absmax, NESTED_BLOCK
        )
        return found + self.offset


@dataclass(frozen=True)
class FloatCodes:
    """A matrix of 4-bit codes in blocks that run through it row by row, whatever its shape.

    codes:  (rows, columns) uint8, below 16, of `levels(kind)`.
    absmax: (blocks,) float32, the largest absolute weight of each block.
    block:  weights in a block; the last may have fewer.
    double: block maxima are stored as `nested`.
    dtype:  the type decoded weights are rounded to.
    """

    codes: Tensor
    absmax: Tensor
    block: int
    double: bool
    dtype: torch.dtype
    kind: Kind = "nf4"

    def decode(self) -> Tensor:
        """The weights, (rows, columns) float32, equal to what a reader of the stored form gets."""
        absmax = self.nested().decode() if self.double else self.absmax
        found = levels(self.kind).to(absmax.device)[self.codes.flatten().int()]
        weight = block_scaled(found, absmax, self.block).view_as(self.codes)
        return weight.to(self.dtype).to(weight.dtype)

    def nested(self) -> Nested:
        """The block maxima as they are stored if `double`."""
        offset = self.absmax.mean()
        rest = self.absmax - offset
        absmax = _peaks(rest, NESTED_BLOCK)
        codes = _nearest(_normalized(rest, absmax, NESTED_BLOCK), dynamic_levels())
        return Nested(codes, absmax, offset)

    def split(self, rows: list[int]) -> list[FloatCodes]:
        """The matrices that so many rows each were stacked from.

        Raises ValueError if a block has weights of two of them.
        """
        columns = self.codes.shape[1]
        weights = [count * columns for count in rows]
        if any(end % self.block for end in list(accumulate(weights))[:-1]):
            raise ValueError(f"blocks of {self.block} run across matrices of {columns} columns")
        absmax = self.absmax.split([-(-count // self.block) for count in weights])
        return [
            replace(self, codes=part, absmax=peaks)
            for part, peaks in zip(self.codes.split(rows), absmax, strict=True)
        ]


@dataclass(frozen=True)
class IntegerCodes:
    """A matrix of 8-bit integers, the largest of each row at -127 or 127.

    codes:  (rows, columns) int8. absmax: (rows,) float32, the largest absolute weight of each row.
    dtype:  the type decoded weights are rounded to.
    """

    codes: Tensor
    absmax: Tensor
    dtype: torch.dtype

    def decode(self) -> Tensor:
        """The weights, (rows, columns) float32, equal to what a reader of the stored form gets."""
        weight = self.codes * self.absmax[:, None] * FRACTION
        return weight.to(self.dtype).to(weight.dtype)

    def split(self, rows: list[int]) -> list[IntegerCodes]:
        """The matrices that so many rows each were stacked from."""
        parts = zip(self.codes.split(rows), self.absmax.split(rows), strict=True)
        return [IntegerCodes(*part, self.dtype) for part in parts]


def quantize(
    weight: Tensor,
    gram: Tensor | None = None,
    *,
    group_size: int,
    scale_dtype: torch.dtype,
    scale_bits: int | None = None,
    kind: Kind = "nf4",
) -> FloatCodes:
    """Scale blocks to [-1, 1] and round to quantiles of a normal distribution: the `nf4` method.

    weight:      (rows, columns) float32. Not modified.
    gram:        has no part in this method.
    group_size:  weights that share a maximum: a run of the rows one after another, which may cross
                 from one into the next.
    scale_dtype: only of decoded weights; block maxima are float32 in this format.
    scale_bits:  8 to store block maxima as `Nested`: 0.37 bits less per weight for blocks of 64.

    Zero is a level: blocks of zeros decode to zeros.

    Source: Dettmers et al., arXiv:2305.14314; codes and maxima equal those of bitsandbytes bit by
    bit. Only codes of maxima in 8 bits are the nearest here, while its CPU kernel looks them up
    in a coarser table, and misses by one where two are all but equally near.
    """
    flat = weight.flatten()
    absmax = _peaks(flat, group_size)
    table = levels(kind)
    order = table.argsort()
    ranks = _nearest(_normalized(flat, absmax, group_size), table[order])
    codes = order.to(torch.uint8).to(weight.device)[ranks.int()]
    double = scale_bits == 8
    return FloatCodes(codes.view_as(weight), absmax, group_size, double, scale_dtype, kind)


def quantize_rows(
    weight: Tensor, gram: Tensor | None = None, *, scale_dtype: torch.dtype
) -> IntegerCodes:
    """Scale every row to [-127, 127] and round: the `int8` method.

    Arguments as in `quantize`. A row of zeros decodes to zeros.

    Source: Dettmers et al., arXiv:2208.07339; equal to bitsandbytes bit by bit. It rounds weights
    to float16 first when it loads a model, which loses what is below 6e-8; this does not.
    """
    absmax = weight.abs().amax(1)
    factor = torch.where(absmax > 0, 127.0 / absmax, 0.0)
    codes = weight.mul(factor[:, None]).round_().to(torch.int8)
    return IntegerCodes(codes, absmax, scale_dtype)


def block_scaled(values: Tensor, factors: Tensor, block: int) -> Tensor:
    """Values, (n,), times the factor of their block, (ceil(n / block),)."""
    padded = pad(values, (0, -len(values) % block)).view(-1, block)
    return (padded * factors[:, None]).flatten()[: len(values)]


def _peaks(values: Tensor, block: int) -> Tensor:
    """The largest absolute value of each block of (n,) values."""
    return pad(values.abs(), (0, -len(values) % block)).view(-1, block).amax(1)


def _normalized(values: Tensor, peaks: Tensor, block: int) -> Tensor:
    """Values, (n,), over the largest of their block: in [-1, 1]."""
    return block_scaled(values, 1 / peaks.clamp(min=LEAST_PEAK), block).clamp_(-1, 1)


def _nearest(values: Tensor, table: Tensor) -> Tensor:
    """The index of the nearest entry of an ascending table, (n,) uint8; of two, the lower."""
    bounds = ((table[:-1] + table[1:]) / 2).to(values.device)
    return torch.bucketize(values, bounds, out_int32=True).to(torch.uint8)
