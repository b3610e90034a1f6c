"""HIGGS: vector grids for weights that a Hadamard rotation made normal."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from compresso.errors import ConfigError
from compresso.kernels.gptq import ROOM, factorize
from compresso.kernels.hadamard import block_size, transform, transform_gram
from compresso.kernels.scales import in_parts, row_scale_of, split_rows
from compresso.kernels.sweep import row_slices
from compresso.kernels.tiles import on_each, row_tiles
from compresso.kernels.vector_grid import VectorGrid, nearest, vector_grid
from compresso.kernels.vector_sweep import Descent, Metric, Store, round_in_turn

DIMENSIONS = (4, 2, 1)  # of the grids there are, the largest with at most 2**POINT_BITS points
POINT_BITS = 8
FACTORS = (0.9, 0.95, 1.0, 1.05, 1.1)  # of the root mean square, tried as scales


@dataclass(frozen=True)
class VectorCodes:
    """A matrix quantized with a vector grid.

    codes: (rows, columns // grid.dimension) uint8: the points of runs of rotated weights.
    scale: (rows, columns // block) float32, at least 0, in units of the weight: what the points of
           a block are multiplied by; values that `dtype` holds exactly, or parts of `row_scale`.
    block: columns rotated together, a power of two.
    dtype: the type scales are stored in, and decoded weights are rounded to.
    row_scale: (rows, 1) float32, by `row_scale_of`, if scales are stored in 8 bits.
    """

    codes: Tensor
    scale: Tensor
    grid: VectorGrid
    block: int
    dtype: torch.dtype
    row_scale: Tensor | None = None

    def decode(self) -> Tensor:
        """The weights, (rows, columns) float32, rounded once, to `dtype`."""
        rows, vectors = self.codes.shape
        columns = vectors * self.grid.dimension
        points = self.grid.points.to(self.codes.device, self.scale.dtype)
        weight = self.scale.new_empty(rows, columns)

        def decode(here: slice) -> None:
            part = points.index_select(0, self.codes[here].flatten().int())
            part = part.view(-1, columns // self.block, self.block).mul_(self.scale[here, :, None])
            weight[here] = transform(part, self.block).view(-1, columns).to(self.dtype)

        on_each(decode, row_tiles(weight), weight.device)
        return weight

    def split(self, rows: list[int]) -> list[VectorCodes]:
        """The matrices that so many rows each were stacked from."""
        shared = split_rows(self.row_scale, rows)
        parts = zip(self.codes.split(rows), self.scale.split(rows), shared, strict=True)
        return [replace(self, codes=c, scale=s, row_scale=row) for c, s, row in parts]


def quantize(
    weight: Tensor,
    gram: Tensor | None = None,
    *,
    bits: int,
    dimension: int | None,
    block: int,
    scale_dtype: torch.dtype,
    scale_bits: int = 16,
    fit: Literal["rms", "mse"] = "rms",
) -> VectorCodes:
    """Rotate, scale to unit variance, and round to the nearest points: the `higgs` method.

    weight:      (rows, columns) float32. Not modified.
    gram:        has no part in this method.
    bits:        per weight; picks the grid of `2 ** (bits * dimension)` points.
    dimension:   weights rounded together; None for as many as divide the columns and have a grid.
    block:       columns rotated together and sharing a scale; where it does not divide the columns,
                 the largest power of two that does and is smaller.
    scale_dtype: scales are rounded to it before codes are chosen.
    scale_bits:  8 to round them further, to parts of a scale of their row.
    fit:         "rms" takes the root mean square of a block as its scale, right for normal weights;
                 "mse" looks for the least squared error around it, in 3 times the time: at 4 bits
                 3 % less error in blocks of 1024, 8 in 256, 16 in 64; at 2 bits 1 to 3 %.

    A block of zeros decodes to exactly zero.

    Raises ConfigError if there is no such grid, or if vectors do not fit the columns.

    Source: Malinovskii et al., arXiv:2411.17525, without random signs, as transformers has it.
    """
    grid, block = _choose(weight.shape[1], bits, dimension, block)
    dimension = grid.dimension
    rows, columns = weight.shape
    codes = torch.empty(rows, columns // dimension, dtype=torch.uint8, device=weight.device)
    scale = weight.new_empty(rows, columns // block)
    row_scale = weight.new_empty(rows, 1) if scale_bits == 8 else None

    def code(here: slice) -> None:
        rotated = transform(weight[here], block).view(-1, columns // block, block)
        scale[here] = _fit_scale(rotated, grid, scale_dtype)
        if fit == "mse":
            scale[here] = _search(rotated, scale[here], grid, scale_dtype)
        if row_scale is not None:
            row_scale[here] = row_scale_of(weight[here], scale[here], dtype=scale_dtype)
            scale[here] = in_parts(scale[here], row_scale[here])
        rotated.div_(_divisor(scale[here])[..., None])
        codes[here] = nearest(grid, rotated.view(len(rotated), -1, dimension))

    on_each(code, row_tiles(weight), weight.device)
    return VectorCodes(codes, scale, grid, block, scale_dtype, row_scale)


def quantize_with_feedback(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    dimension: int | None,
    block: int,
    damping: float,
    act_order: bool,
    refine: int,
    scale_dtype: torch.dtype,
    scale_bits: int = 16,
) -> VectorCodes:
    """Round vectors one after another, each one's error moved to later ones: `gptq+higgs`.

    weight:    (rows, columns) float32: the stacked rows of all linears that read the same input.
               Not modified.
    gram:      (columns, columns) float32: the mean of x x^T over tokens of it. Not modified.
    damping:   as in `factorize`.
    act_order: take vectors by their falling share of the rotated gram's diagonal.
    refine:    passes of `descend` over codes and scales afterwards.

    Other arguments as in `quantize`, with the same scales to start from. Everything happens on
    rotated weights, whose input has the rotated gram.

    Raises NumericalError as `factorize` does, and ConfigError as `quantize` does.
    """
    grid, block = _choose(weight.shape[1], bits, dimension, block)
    dimension = grid.dimension
    rotated_gram = transform_gram(gram, block)
    order = torch.arange(len(gram), device=gram.device).view(-1, dimension)
    if act_order:
        share = rotated_gram.diagonal().view(-1, dimension).sum(1)
        order = order[share.argsort(descending=True, stable=True)]
    vectors, order = order[:, 0] // dimension, order.flatten()
    ordered = rotated_gram[order[:, None], order]
    metric = Metric.of_factor(factorize(ordered, damping=damping, act_order=False), dimension)
    del ordered
    points = grid.points.to(weight.device, weight.dtype)
    codes = torch.empty(len(weight), len(vectors), dtype=torch.uint8, device=weight.device)
    scale = weight.new_empty(len(weight), len(gram) // block)
    row_scale = weight.new_empty(len(weight), 1) if scale_bits == 8 else None
    for here in row_slices(weight):
        rotated = transform(weight[here], block)
        scale[here] = _fit_scale(rotated.view(len(rotated), -1, block), grid, scale_dtype)
        if row_scale is not None:
            row_scale[here] = row_scale_of(weight[here], scale[here], dtype=scale_dtype, room=ROOM)
            scale[here] = in_parts(scale[here], row_scale[here])
        anchor = rotated.t()[order]
        each = scale[here].t()[vectors * dimension // block]
        rounded = round_in_turn(anchor.clone(), anchor, metric, points, each)
        codes[here, vectors] = rounded.t()
    del metric  # as large as the gram
    found = VectorCodes(codes, scale, grid, block, scale_dtype, row_scale)
    return descend(weight, found, rotated_gram, damping=damping, passes=refine)


def descend(
    weight: Tensor, start: VectorCodes, rotated_gram: Tensor, *, damping: float, passes: int
) -> VectorCodes:
    """Lower tr((W - Q) G (W - Q)^T) by exact steps on one vector, or one scale, at a time.

    weight:       W, (rows, columns) float32. Not modified.
    start:        Q. Not modified.
    rotated_gram: (columns, columns) float32, by `transform_gram` with the block of Q.
    damping:      fraction of the diagonal's mean added to it, over columns with input.
    passes:       times to go through all blocks.

    In each block, every vector in turn becomes the best point given all others, then the scale of
    each row the best one that can be stored. No step raises the sum, up to the rounding of decoded
    weights. Source: as `descent.descend`, with vectors in place of numbers.
    """
    if not passes:
        return start
    grid, block = start.grid, start.block
    codes, scale = torch.empty_like(start.codes), torch.empty_like(start.scale)
    points = grid.points.to(weight.device, weight.dtype)
    diagonal = rotated_gram.diagonal()
    ridge = damping * diagonal.sum() / (diagonal != 0).sum().clamp(min=1)
    metrics = []
    for columns in torch.arange(len(diagonal), device=weight.device).split(block):
        within = rotated_gram[columns[:, None], columns]
        within.diagonal().add_(ridge)
        metrics.append(Metric.of_gram(within, grid.dimension))
    for here in row_slices(weight):
        state = Descent(
            transform(weight[here], block).t().contiguous(),
            start.codes[here].t().contiguous(),
            start.scale[here].t().contiguous(),
            points,
        )
        store: Store = partial(_storable, grid=grid, block=block, dtype=start.dtype)
        if start.row_scale is not None:
            store = partial(in_parts, row_scale=start.row_scale[here, 0])
        for _ in range(passes):
            for group, metric in enumerate(metrics):
                state.improve(group, rotated_gram, ridge, metric, store)
        codes[here], scale[here] = state.codes.t(), state.scale.t()
    return replace(start, codes=codes, scale=scale)


def _choose(columns: int, bits: int, dimension: int | None, block: int) -> tuple[VectorGrid, int]:
    """The grid and the block for a matrix of so many columns."""
    if dimension is None:
        fitting = (d for d in DIMENSIONS if bits * d <= POINT_BITS and columns % d == 0)
        dimension = next(fitting, 1)
    try:
        grid = vector_grid(dimension, 2 ** (bits * dimension))
    except ValueError as error:
        raise ConfigError(
            f"no vector grid has `bits` {bits} and `dimension` {dimension}",
            hint="`dimension` 1 has 2, 3, 4 and 8 bits, 2 has 2, 3 and 4, and 4 has 2",
        ) from error
    if columns % dimension:
        raise ConfigError(
            f"{columns} columns do not divide into vectors of `dimension` {dimension}",
            hint="use a smaller `dimension`, or keep this linear with `--ignore`",
        )
    return grid, block_size(columns, block)


def _fit_scale(rotated: Tensor, grid: VectorGrid, dtype: torch.dtype) -> Tensor:
    """The root mean square of blocks in the last dimension, as stored."""
    # Relative to the largest value, so that no square of one under- or overflows.
    peak = _divisor(rotated.abs().amax(-1))
    relative = torch.linalg.vector_norm(rotated / peak[..., None], dim=-1)
    size = rotated.shape[-1]
    return _storable(relative * peak / math.sqrt(size), grid=grid, block=size, dtype=dtype)


def _search(rotated: Tensor, scale: Tensor, grid: VectorGrid, dtype: torch.dtype) -> Tensor:
    """The stored scales of least squared error, (rows, blocks), among some around `scale`.

    rotated: (rows, blocks, columns of a block).
    """
    vectors = rotated.view(*rotated.shape[:2], -1, grid.dimension)
    points = grid.points.to(rotated.device)
    best, least = scale, torch.full_like(scale, math.inf)
    for factor in FACTORS:
        codes = nearest(grid, vectors / _divisor(scale * factor)[..., None, None])
        levels = points.index_select(0, codes.flatten().int()).view_as(rotated)
        product, square = (levels * rotated).sum(-1), levels.square_().sum(-1)
        # The scale of least squares for these codes, and what it leaves of the sum of squares.
        trial = _storable(product / square, grid=grid, block=rotated.shape[-1], dtype=dtype)
        error = trial * (trial * square - 2 * product)
        best = torch.where(error < least, trial, best)
        least = torch.minimum(error, least)
    return best


def _storable(scale: Tensor, *, grid: VectorGrid, block: int, dtype: torch.dtype) -> Tensor:
    """The nearest scales that `dtype` holds and that decode to finite weights."""
    most = torch.finfo(dtype).max / (2 * math.sqrt(block) * grid.points.abs().max().item())
    return scale.clamp(0, most).to(dtype).to(scale.dtype)


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
