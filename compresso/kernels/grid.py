"""Uniform grids: which values a group of weights may take, and how they are found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from compresso.kernels.grid_search import Trial, search_grid
from compresso.kernels.scales import row_scale_of, split_rows, storable
from compresso.kernels.tiles import CPU_TILE, GPU_TILE, on_each, row_tiles


@dataclass(frozen=True)
class Grid:
    """Weights are read as `scale * (code - zero)`, one scale and zero for each group of a row.

    scale: (rows, groups) float32, in units of the weight, values that can be stored: see
           `storable`; never 0, negative where that fits a symmetric group better.
    zero:  (rows, groups) float32, whole numbers from 0 to `max_code`; 2**(bits - 1) if symmetric.
    bits:  bits of a code.
    dtype: the type scales are stored in, and decoded weights are rounded to.
    row_scale: (rows, 1) float32, by `row_scale_of`, if scales are stored in 8 bits.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    dtype: torch.dtype = torch.float32
    row_scale: Tensor | None = None

    @property
    def max_code(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.bits - 1


@dataclass(frozen=True)
class Packed:
    """A quantized matrix.

    codes: (rows, columns) uint8, from 0 to `grid.max_code`.
    """

    codes: Tensor
    grid: Grid

    def decode(self) -> Tensor:
        """The weights, (rows, columns) float32, equal to what a reader of the stored form gets.

        The product is exact in float32 and rounded once, to `grid.dtype`, as a multiplication in
        that type is.
        """
        grid = self.grid
        weight = grid.scale.new_empty(self.codes.shape)

        def decode(here: slice) -> None:
            scale, zero = grid.scale[here, :, None], grid.zero[here, :, None]
            levels = self.codes[here].reshape(*scale.shape[:2], -1).to(weight.dtype)
            weight[here] = levels.sub_(zero).mul_(scale).flatten(1).to(grid.dtype)

        on_each(decode, row_tiles(weight), weight.device)
        return weight

    def split(self, rows: list[int]) -> list[Packed]:
        """The matrices that so many rows each were stacked from."""
        grid = self.grid
        parts = zip(
            self.codes.split(rows),
            grid.scale.split(rows),
            grid.zero.split(rows),
            split_rows(grid.row_scale, rows),
            strict=True,
        )
        return [
            Packed(codes, replace(grid, scale=scale, zero=zero, row_scale=row_scale))
            for codes, scale, zero, row_scale in parts
        ]


def fit_grid(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    scale_bits: int = 16,
    search: Literal["mse", "minmax"] = "mse",
    importance: Tensor | None = None,
    power: int = 2,
    room: float = 1.0,
) -> Grid:
    """Fit a grid to every run of `group_size` columns of every row.

    weight:      (rows, columns) float32. Not modified.
    group_size:  columns sharing a scale, a divisor of `columns`; -1 for all of them.
    scale_dtype: scales are rounded to it first, so codes fit the stored scales.
    scale_bits:  8 to round them further, to parts of a scale of their row.
    search:      "minmax" spans the extremes of the group and 0; "mse" then looks for the least
                 sum of squared errors, which is never more than that of "minmax".
    importance:  (columns,) float32, factors of the squared errors in that sum; all 1 if None.
    power:       of the errors in that sum, if not squares; the higher, the wider the grid.
    room:        for scales in 8 bits to grow: see `row_scale_of`.

    A group of zeros decodes to exactly zero. Every decoded weight is finite.

    Raises ValueError if `group_size` does not divide the columns.

    Source: GPTQ's quantizer, github.com/IST-DASLab/gptq `quant.py`, for "minmax", but a symmetric
    group without negative weights spans both signs like any other.
    """
    rows, columns = weight.shape
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise ValueError(f"{columns} columns do not divide into groups of {size}")
    store = partial(storable, dtype=scale_dtype, max_code=2**bits - 1)
    scale, zero = weight.new_empty(2, columns // size, rows)

    def fit(tile: tuple[slice, slice]) -> None:
        here, groups = tile
        weights = slice(groups.start * size, groups.stop * size)
        # Only a whole contiguous matrix is turned block by block, which is several times faster.
        part = weight[here, weights].contiguous().t().contiguous()
        part = part.view(-1, size, part.shape[1])
        found = _span_extremes(part, bits, symmetric, store)
        if search == "mse":
            factors = None if importance is None else importance[weights].view(-1, 1, size)
            trial = Trial(part, factors, bits, symmetric, store, power)
            found = search_grid(trial, found)
        scale[groups, here], zero[groups, here] = found

    on_each(fit, _tiles(weight, size), weight.device)
    scale, zero, row_scale = scale.t().contiguous(), zero.t().contiguous(), None
    if scale_bits == 8:
        most = 2**bits - 1
        row_scale = row_scale_of(weight, scale, dtype=scale_dtype, max_code=most, room=room)
        scale = store(scale, row_scale=row_scale)
    return Grid(scale, zero, bits, scale_dtype, row_scale)


def round_to_grid(weight: Tensor, grid: Grid) -> Packed:
    """Give every weight, (rows, columns) float32, the code of the nearest value on its grid.

    Halves go to the even side of `zero`. The weight is not modified.
    """
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)

    def code(here: slice) -> None:
        scale, zero = grid.scale[here, :, None], grid.zero[here, :, None]
        grouped = weight[here].reshape(*scale.shape[:2], -1)
        levels = torch.div(grouped, scale).round_().add_(zero).clamp_(0, grid.max_code)
        codes[here] = levels.flatten(1)

    on_each(code, row_tiles(weight), weight.device)
    return Packed(codes, grid)


def quantize(
    weight: Tensor,
    gram: Tensor | None = None,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    grid: Literal["mse", "minmax"],
    scale_dtype: torch.dtype,
    scale_bits: int = 16,
) -> Packed:
    """Fit a grid and round to it: the `rtn` method. Arguments as in `fit_grid`.

    gram: has no part in this method.
    """
    fitted = fit_grid(
        weight,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        scale_dtype=scale_dtype,
        scale_bits=scale_bits,
        search=grid,
    )
    return round_to_grid(weight, fitted)


def _tiles(weight: Tensor, size: int) -> Iterator[tuple[slice, slice]]:
    """Rows, and groups of so many columns, that are worked on at once."""
    rows, columns = weight.shape
    budget = CPU_TILE if weight.device.type == "cpu" else GPU_TILE
    height = min(rows, max(64, budget // size))
    width = max(1, budget // (size * height))
    for row in range(0, rows, height):
        for group in range(0, columns // size, width):
            yield slice(row, row + height), slice(group, group + width)


def _span_extremes(
    tile: Tensor, bits: int, symmetric: bool, store: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """The "minmax" grid of a tile, (groups, size, rows): scale and zero, each (groups, rows)."""
    max_code = 2**bits - 1
    low, high = tile.amin(1).clamp_(max=0), tile.amax(1).clamp_(min=0)
    if symmetric:
        low = torch.minimum(low, -high)
        high = -low
    # Each end on its own, because their difference can be infinite.
    scale = high / max_code - low / max_code
    scale = store(torch.where(scale > 0, scale, 1.0))
    if symmetric:
        return scale, torch.full_like(scale, 2 ** (bits - 1))
    return scale, torch.round(-low / scale).clamp_(0, max_code)
