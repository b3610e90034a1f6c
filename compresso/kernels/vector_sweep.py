"""Rounding vectors of columns one after another, with feedback, and descent on their codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.kernels.gptq import Factor

Store = Callable[[Tensor], Tensor]
BLOCKS = 64  # small matrices multiplied at once
SCORES = 2**18  # of points tried for vectors at once, so that they stay in the cache of a CPU


@dataclass(frozen=True)
class Metric:
    """What the changes of the columns of each vector cost, and how they move later columns.

    A change d of the weights costs `sum_b |d_b + sum_{a<b} F_ba d_a|^2` in the metric of b.

    within:   (vectors, p, p), symmetric: the metrics.
    feedback: F, (columns, columns), zero for the columns of the same and of later vectors.
    """

    within: Tensor
    feedback: Tensor

    @classmethod
    def of_factor(cls, factor: Factor, dimension: int) -> Metric:
        """That of runs of `dimension` columns, in the order of the factor, which is used up."""
        feedback = factor.feedback
        unit = _diagonal_blocks(feedback, dimension).clone()
        unit.diagonal(dim1=1, dim2=2).fill_(1)
        weighted = factor.pivots.view(-1, dimension, 1) * unit
        _diagonal_blocks(feedback, dimension).zero_()
        _multiply_blocks(torch.linalg.inv(unit), feedback)
        return cls(unit.transpose(1, 2) @ weighted, feedback)

    @classmethod
    def of_gram(cls, gram: Tensor, dimension: int) -> Metric:
        """That of steps from the best value of each vector given all others; gram as it is."""
        feedback = gram.tril(-1)
        within = _diagonal_blocks(gram, dimension).clone()
        # Without input and without damping a column has no best value, and keeps its own.
        curvature = within.diagonal(dim1=1, dim2=2)
        curvature[curvature == 0] = 1
        _diagonal_blocks(feedback, dimension).zero_()
        _multiply_blocks(torch.linalg.inv(within), feedback)
        return cls(within, feedback)


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """A view of the (count, size, size) blocks on the diagonal."""
    count = len(matrix) // size
    blocks = matrix.view(count, size, count, size)
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _multiply_blocks(left: Tensor, matrix: Tensor) -> None:
    """Multiply runs of rows of a matrix by one small matrix each, in place."""
    count, size, _ = left.shape
    runs = matrix.view(count, size, -1)
    for some, rows in zip(left.split(BLOCKS), runs.split(BLOCKS), strict=True):
        rows.copy_(torch.bmm(some, rows))


def round_in_turn(
    target: Tensor,
    anchor: Tensor,
    metric: Metric,
    points: Tensor,
    scale: Tensor,
    *,
    block: int = 32,
) -> Tensor:
    """Round one vector after another, each shifted by the changes of those before it.

    target: (columns, rows): what to round. Overwritten with the changes, which are `anchor` less
            what was rounded to.
    anchor: (columns, rows): what changes are counted from. Not modified.
    points: (size, dimension), times a scale: what a vector can be rounded to.
    scale:  (vectors, rows): 0 rounds to 0.
    block:  columns between matrix products, a multiple of the dimension. Changes the speed, and
            the result only through the order of sums.

    Returns the codes, (vectors, rows) uint8. Exact: the point that costs least in the metric.
    """
    codes = torch.empty_like(scale, dtype=torch.uint8)
    dimension = points.shape[1]
    scored = metric.within @ points.t()
    offset = (points.t() * scored).sum(1).div_(-2)
    divisor = torch.where(scale != 0, scale, 1.0)
    for number, start in enumerate(range(0, len(target), block), start=1):
        stop = min(start + block, len(target))
        for first in range(start, stop, dimension):
            here, vector = slice(first, first + dimension), first // dimension
            shifted = target[here]
            if first > start:
                shifted.addmm_(metric.feedback[here, start:first], target[start:first])
            chosen = _best(shifted / divisor[vector], scored[vector], offset[vector])
            rounded = points.index_select(0, chosen).t() * scale[vector]
            torch.sub(anchor[here], rounded, out=shifted)
            codes[vector] = chosen
        # A binary tree of blocks, as in `sweep.round_in_turn`.
        half = block * (number & -number)
        left, right = slice(start + block - half, stop), slice(stop, stop + half)
        target[right].addmm_(metric.feedback[right, left], target[left])
    return codes


def _best(vectors: Tensor, scored: Tensor, offset: Tensor) -> Tensor:
    """The points, int64, of largest `vectors^T scored + offset`; vectors are (dimension, rows)."""
    step = max(1, SCORES // len(offset)) if vectors.device.type == "cpu" else vectors.shape[1]
    parts = vectors.t().split(step)
    return torch.cat([torch.addmm(offset, part, scored).max(1).indices for part in parts])


class Descent:
    """Some rows on their way down; transposed, so that columns are contiguous.

    codes: (vectors, rows) uint8.
    scale: (groups, rows) float32.
    """

    def __init__(self, weight: Tensor, codes: Tensor, scale: Tensor, points: Tensor) -> None:
        """Start at codes and scales, which are overwritten; weight is (columns, rows)."""
        self.codes, self.scale, self.points = codes, scale, points
        self.size = len(weight) // len(scale)
        self.change = weight.clone()
        for group in range(len(scale)):
            self.change[self._columns(group)] -= self._levels(group) * scale[group]

    def improve(
        self, group: int, gram: Tensor, ridge: Tensor, metric: Metric, store: Store
    ) -> None:
        """Set the codes of one group, and then its scales, to their best.

        gram:   (columns, columns); `ridge` stands for what is added to its diagonal.
        metric: of the group's own part of that sum.
        store:  rounds scales to those that can be stored.
        """
        columns, scale = self._columns(group), self.scale[group]
        vectors = self._vectors(group)
        within = gram[columns, columns]
        gradient = torch.addmm(self.change[columns] * ridge, gram[columns], self.change)
        anchor = self._levels(group) * scale
        runs = gradient.view(len(metric.within), -1, len(scale))
        moved = torch.baddbmm(anchor.view_as(runs), torch.linalg.inv(metric.within), runs)
        moved = moved.view_as(anchor)
        each = scale.expand(len(metric.within), -1)
        self.codes[vectors] = round_in_turn(moved, anchor, metric, self.points, each)
        self.change[columns] += moved
        gradient.addmm_(within, moved).add_(moved * ridge)

        levels = self._levels(group)
        slope = (levels * gradient).sum(0)
        bend = (levels * torch.addmm(levels * ridge, within, levels)).sum(0)
        best = store(scale + torch.where(bend > 0, slope / bend, 0.0))
        moved_by = best - scale
        lower = moved_by * (2 * slope - moved_by * bend) > 0
        self.change[columns] -= levels * torch.where(lower, moved_by, 0.0)
        self.scale[group] = torch.where(lower, best, scale)

    def _columns(self, group: int) -> slice:
        return slice(group * self.size, (group + 1) * self.size)

    def _vectors(self, group: int) -> slice:
        count = self.size // self.points.shape[1]
        return slice(group * count, (group + 1) * count)

    def _levels(self, group: int) -> Tensor:
        """The points of a group before scaling, (columns, rows)."""
        codes = self.codes[self._vectors(group)]
        points = self.points.t().index_select(1, codes.flatten().int())
        return points.view(-1, *codes.shape).transpose(0, 1).reshape(self.size, -1)
