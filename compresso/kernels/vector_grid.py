"""Vector grids: the points that runs of normally distributed weights are rounded to."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CPU_TILE = 2**16  # vectors searched at once, so that the steps run in the second-level cache
GPU_TILE = 2**24
SCAN_TILE = 2**19  # scores at once, where every point is tried

# Half the width of the box of cubes and the number of times it is halved, by dimension. With 256
# points, 1 in 7 vectors of 2 dimensions is in a cube with more than one candidate, and has up to 4;
# of 4 dimensions most are, and have up to 5, rarely 12.
BOXES = {1: (8, 14), 2: (8, 10), 4: (4, 5)}
# Lists are searched by length, each list in the first of these that holds it.
LIST_LENGTHS = (5, 10, 20, 40, 80, 256)


@dataclass(frozen=True, eq=False)
class VectorGrid:
    """Points that `dimension` consecutive weights are rounded to together.

    points: (size, dimension) float32, for weights of zero mean and unit variance; on the CPU.
    """

    points: Tensor

    @property
    def size(self) -> int:
        """Number of points, at most 256."""
        return self.points.shape[0]

    @property
    def dimension(self) -> int:
        """Weights in one point."""
        return self.points.shape[1]

    @property
    def code_bits(self) -> int:
        """Bits of one stored code, which stands for `dimension` weights."""
        return math.ceil(math.log2(self.size))

    @property
    def bits(self) -> float:
        """Bits per weight that the choice of a point carries; scales not counted."""
        return math.log2(self.size) / self.dimension

    @property
    def name(self) -> str:
        """Short and unique among the shipped grids, such as `p2n256`."""
        return f"p{self.dimension}n{self.size}"

    @cached_property
    def _cells(self) -> _Cells:
        return _cut(self.points)


@cache
def vector_grid(dimension: int, size: int) -> VectorGrid:
    """The shipped grid of `size` points in `dimension` dimensions.

    Raises ValueError, naming the sizes there are, if it is not one of them.

    Source: optimal quantizers of the normal distribution, computed by `scripts/make_grids.py`.
    """
    return VectorGrid(torch.tensor(_record(dimension, size)["points"]))


def expected_error(dimension: int, size: int) -> float:
    """Mean squared error per weight of unit variance, if weights are normal; ValueError as above.

    After a Hadamard rotation they nearly are, so this is the relative squared error of any matrix.
    """
    return _record(dimension, size)["mse"]


def _record(dimension: int, size: int) -> dict[str, Any]:
    grids = json.loads(Path(__file__).with_name("vector_grids.json").read_text(encoding="utf-8"))
    name = f"p{dimension}n{size}"
    if name not in grids:
        raise ValueError(f"no grid `{name}`; there are {', '.join(grids)}")
    return grids[name]


def nearest(grid: VectorGrid, values: Tensor) -> Tensor:
    """The code of the point nearest to each vector; of several at the same distance, any.

    values: (..., dimension) float32, finite. Not modified.

    Returns (...) uint8. Exact up to the rounding of distances in float32. Space near the origin is
    cut into small cubes, and for each it is known which points can be nearest: mostly one. The few
    vectors further out are compared with every point.
    """
    cells = grid._cells.to(values.device)
    vectors = values.reshape(-1, grid.dimension)
    codes = torch.empty(len(vectors), dtype=torch.uint8, device=values.device)
    tile = CPU_TILE if values.device.type == "cpu" else GPU_TILE
    for start in range(0, len(vectors), tile):
        codes[start : start + tile] = cells.search(vectors[start : start + tile])
    return codes.view(values.shape[:-1])


def scan(points: Tensor, vectors: Tensor) -> Tensor:
    """The codes of the nearest points, uint8, by trying every point.

    points: (size, dimension) float32, at most 256; vectors: (count, dimension) float32.
    """
    offset = points.square().sum(1).div_(-2)
    parts = vectors.split(max(1, SCAN_TILE // len(points)))
    scores = (torch.addmm(offset, part, points.t()) for part in parts)
    return torch.cat([score.max(1).indices.to(torch.uint8) for score in scores])


@dataclass(frozen=True)
class _Lists:
    """The candidates of the cubes that have more than one, for some lengths of list.

    first: entry of the first such cube in the table; the others follow.
    codes: (length, cubes) int32, the shorter lists filled with one of their own.
    """

    first: int
    codes: Tensor


@dataclass(frozen=True)
class _Cells:
    """A box around the origin in cubes, and which points can be nearest to a vector in each.

    points:   (size, dimension) float32.
    reach:    half the width of the box.
    per_unit: cubes in a unit of length, a power of two so that finding the cube is exact.
    strides:  (dimension,) float32: how far apart neighbouring cubes are in the table.
    table:    (cubes,) int32: the code of the only candidate, or an entry of `lists`.
    """

    points: Tensor
    reach: int
    per_unit: float
    strides: Tensor
    table: Tensor
    lists: tuple[_Lists, ...]

    def to(self, device: torch.device) -> _Cells:
        """The same in the memory of `device`."""
        if device == self.points.device:
            return self
        lists = tuple(replace(part, codes=part.codes.to(device)) for part in self.lists)
        points, strides, table = (
            tensor.to(device) for tensor in (self.points, self.strides, self.table)
        )
        return replace(self, points=points, strides=strides, table=table, lists=lists)

    def search(self, vectors: Tensor) -> Tensor:
        """Codes of the nearest points, (count,) uint8, of vectors (count, dimension)."""
        half = self.reach * self.per_unit
        place = (vectors * self.per_unit).floor_().clamp_(-half, half - 1)
        # Whole numbers under 2**24, so float32 is exact; and faster than integers.
        cube = (place @ self.strides).add_(half * self.strides.sum())
        entry = self.table.index_select(0, cube.int())
        codes = entry.to(torch.uint8)
        places = (entry >= len(self.points)).nonzero()[:, 0]
        entry = entry.index_select(0, places)
        for part in self.lists:
            here, row = places, entry - part.first
            if len(self.lists) > 1:
                chosen = ((row >= 0) & (row < part.codes.shape[1])).nonzero()[:, 0]
                here, row = places[chosen], row[chosen]
            codes[here] = self._best(vectors.index_select(0, here), part.codes, row)
        if max(abs(bound) for bound in torch.stack(vectors.aminmax()).tolist()) >= self.reach:
            here = (vectors.abs() >= self.reach).any(1).nonzero()[:, 0]
            codes[here] = scan(self.points, vectors[here])
        return codes

    def _best(self, vectors: Tensor, lists: Tensor, row: Tensor) -> Tensor:
        """Of the candidates in the columns `row` of lists, those nearest to vectors: uint8."""
        least = torch.full(row.shape, math.inf, dtype=vectors.dtype, device=vectors.device)
        best = torch.zeros_like(row)
        values = vectors.t().contiguous()
        for codes in lists:
            code = codes.index_select(0, row)
            distance = torch.zeros_like(least)
            for value, levels in zip(values, self.points.t(), strict=True):
                distance += levels.index_select(0, code).sub_(value).square_()
            best = torch.where(distance < least, code, best)
            least = torch.minimum(distance, least)
        return best.to(torch.uint8)


def _cut(points: Tensor) -> _Cells:
    """Cut the box of a grid into cubes: halve it again and again, where it is not decided."""
    size, dimension = points.shape
    reach, depth = BOXES[dimension]
    corners = torch.cartesian_prod(*[torch.arange(2)] * dimension).view(-1, dimension)
    places = torch.zeros(1, dimension, dtype=torch.int64)
    candidates = torch.arange(size).to(torch.uint8)[None]
    count = torch.tensor([size])
    table = torch.zeros((1,) * dimension, dtype=torch.int32)
    width = 2.0 * reach
    for _ in range(depth):
        width /= 2
        for axis in range(dimension):
            table = table.repeat_interleave(2, axis)
        places = (2 * places[:, None] + corners).flatten(0, 1)
        candidates, count = _prune(
            points.double(),
            (places + 0.5) * width - reach,
            candidates.repeat_interleave(len(corners), 0),
            count.repeat_interleave(len(corners)),
            width,
        )
        table[places.unbind(1)] = candidates[:, 0].int()
        several = (count > 1).nonzero()[:, 0]
        places, candidates, count = places[several], candidates[several], count[several]

    lists: list[_Lists] = []
    shorter, first = 0, size
    for length in LIST_LENGTHS:
        cubes = ((count > shorter) & (count <= length)).nonzero()[:, 0]
        if not len(cubes):
            continue
        table[places[cubes].unbind(1)] = torch.arange(first, first + len(cubes)).int()
        lists.append(_Lists(first, candidates[cubes, :length].int().t().contiguous()))
        shorter, first = length, first + len(cubes)
    strides = 2.0 ** (depth * torch.arange(dimension - 1, -1, -1))
    return _Cells(points, reach, 1 / width, strides, table.flatten(), tuple(lists))


def _prune(
    points: Tensor, middles: Tensor, candidates: Tensor, count: Tensor, width: float
) -> tuple[Tensor, Tensor]:
    """The candidates that are nearest somewhere in a cube, the nearest to its middle first.

    middles:    (cubes, dimension); `width` is that of every cube.
    candidates: (cubes, length), of which the first `count`, (cubes,), are counted.

    Returns both, in this form. What a point loses to the one nearest to the middle is linear in the
    vector: it loses everywhere if it does in the corner that is best for it.
    """
    kept = torch.empty_like(candidates)
    # Cubes with lists of about one length at a time.
    for here in count.argsort().split(max(1, SCAN_TILE // candidates.shape[1])):
        length = int(count[here].max())
        codes, positions = candidates[here, :length], torch.arange(length)
        others = points[codes.flatten().int()].view(*codes.shape, -1)
        distance = (others - middles[here, None]).square_().sum(2)
        distance.masked_fill_(positions >= count[here, None], math.inf)
        least, best = distance.min(1, keepdim=True)
        winner = others.gather(1, best[..., None].expand(-1, -1, others.shape[2]))
        margin = (others - winner).abs_().sum(2).mul_(width * (1 + 1e-9))
        lost = distance - least > margin
        codes = codes.gather(1, distance.masked_fill_(lost, math.inf).argsort(1))
        count[here] = length - lost.sum(1)
        kept[here, :length] = torch.where(positions < count[here, None], codes, codes[:, :1])
        kept[here, length:] = codes[:, :1]
    return kept[:, : int(count.max())], count
