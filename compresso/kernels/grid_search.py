"""The search for the uniform grid that loses least of a group of weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FEW_BITS = 4
COARSE_STEPS = 8  # 6 lose up to 1 % of the squared error found by 200, 12 gain under 0.3 %

# A factor of a scale, and what is added to a zero.
_Change = tuple[float, float]
# Scale, zero and error of each group, (groups, rows).
_Found = tuple[Tensor, Tensor, Tensor]


def search_grid(trial: Trial, extremes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The grid of least error of a tile, (groups, size, rows): scale and zero, each (groups, rows).

    extremes: the "minmax" grid, where the search starts.

    Coarse steps of the scale, finer ones around the best of these, and last the scale of least
    squares for the codes found, in closed form. A symmetric grid has a level more on one side, so
    both signs of the scale are tried, and of others neighbouring zeros: with every coarse step if
    columns matter unlike. If not, zeros are tried with the finer steps, which loses 0.1 %; and from
    4 bits on the level more is for the side of the extreme, which loses nothing.
    """
    scale, zero = extremes
    widest, narrowest = 1.1, 1 - 0.75 ** (trial.bits - 1)
    ratio = (narrowest / widest) ** (1 / (COARSE_STEPS - 1))
    coarse = [(widest * ratio**step, 0.0) for step in range(COARSE_STEPS)]
    near = [(ratio**power, 0.0) for power in (0.25, -0.25, 0.5, -0.5)]
    if trial.symmetric and (trial.weighted or trial.bits < FEW_BITS):
        coarse += [(-factor, 0.0) for factor, _ in coarse]
    elif trial.symmetric:
        scale = torch.where(trial.values.amax(1) > -trial.values.amin(1), -scale, scale)
        near.append((-1.0, 0.0))
    elif trial.weighted:
        coarse += [(factor, shift) for factor, _ in coarse for shift in (-1.0, 1.0)]
    else:
        near += [(ratio**power, shift) for power in (0.0, 0.5, -0.5) for shift in (-1.0, 1.0)]
    found = trial.best(
        trial.best(None, *(x[None] for x in extremes)), *_changed(scale, zero, coarse)
    )
    found = trial.best(found, *_changed(*found[:2], near))
    refit = trial.refit(*found[:2])
    return trial.best(found, refit[None], found[1][None])[:2]


def _changed(scale: Tensor, zero: Tensor, changes: list[_Change]) -> tuple[Tensor, Tensor]:
    """Grids, (groups, rows), changed in several ways: each (changes, groups, rows)."""
    factors, shifts = torch.tensor(changes, dtype=scale.dtype, device=scale.device).T
    return scale * factors.view(-1, 1, 1), zero + shifts.view(-1, 1, 1)


class Trial:
    """One tile, (groups, size, rows), with room to try grids on it.

    symmetric: all zeros are in the middle of the codes.
    weighted:  whether errors of the columns count unlike.
    """

    def __init__(
        self,
        tile: Tensor,
        importance: Tensor | None,
        bits: int,
        symmetric: bool,
        store: Callable[[Tensor], Tensor],
        power: int,
    ) -> None:
        """importance: of the columns, (groups, 1, size); None if they are alike."""
        # Errors are relative to the largest weight of each group: no square of one underflows.
        peak = tile.abs().amax(1)
        self.peak = torch.where(peak > 0, peak, 1.0)
        self.values = tile / self.peak[:, None]
        self.weighted = importance is not None
        if importance is None:
            importance = tile.new_ones(len(tile), 1, tile.shape[1])
        self._importance = importance
        self.bits = bits
        self.max_code = 2**bits - 1
        self.symmetric = symmetric
        self.store = store
        self.power = power
        self.steps = torch.empty_like(self.values)
        self.levels = torch.empty_like(self.values)

    def best(self, found: _Found | None, scales: Tensor, zeros: Tensor) -> _Found:
        """What loses least of `found` and grids (trials, groups, rows), as they are stored."""
        scales, zeros = self.store(scales), zeros.clamp(0, self.max_code)
        sizes = scales / self.peak
        errors = torch.empty_like(scales)
        for index in range(len(scales)):
            self._round(sizes[index], zeros[index])
            # In steps: tensors of one shape take half as long as one that is spread over another.
            lost = torch.sub(self.steps, self.levels, out=self.levels)
            if self.power % 2:
                lost.abs_()
            errors[index] = torch.bmm(self._importance, lost.pow_(self.power))[:, 0]
        errors *= sizes.abs().pow_(self.power)
        if found is not None:
            pairs = zip(found, (scales, zeros, errors), strict=True)
            scales, zeros, errors = (torch.cat((one[None], more)) for one, more in pairs)
        least = errors.min(0, keepdim=True).indices  # many times faster than argmin
        scale, zero, error = (x.gather(0, least)[0] for x in (scales, zeros, errors))
        return scale, zero, error

    def refit(self, scale: Tensor, zero: Tensor) -> Tensor:
        """The scale of least squared error for the codes that `scale` and `zero` give."""
        self._round(scale / self.peak, zero)
        torch.mul(self.levels, self.values, out=self.steps)
        covariance = torch.bmm(self._importance, self.steps)[:, 0]
        variance = torch.bmm(self._importance, self.levels.square_())[:, 0]
        return torch.where(variance > 0, covariance / variance * self.peak, scale)

    def _round(self, size: Tensor, zero: Tensor) -> None:
        """Fill `steps` with the values in units of `size`, and `levels` with codes less `zero`."""
        # A product, as a division of every value takes longer than all the rest.
        torch.mul(self.values, size.reciprocal()[:, None], out=self.steps)
        torch.round(self.steps, out=self.levels)
        if self.symmetric:  # bounds that are numbers take half the time
            middle = 2 ** (self.bits - 1)
            self.levels.clamp_(-middle, self.max_code - middle)
        else:
            self.levels.clamp_(-zero[:, None], (self.max_code - zero)[:, None])
