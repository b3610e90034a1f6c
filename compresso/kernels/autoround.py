"""AutoRound: rounding and clipping as numbers that a gradient can move."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compresso.kernels.grid import Grid, Packed
from compresso.kernels.scales import storable

FARTHEST = 0.49  # from the code a weight starts at, in steps: it is still rounded to that code


@dataclass(frozen=True)
class Latent:
    """What is rounded: it gives the codes of `grid` that were started from, until it is moved.

    position:  (rows, columns) float32, codes before rounding.
    grid:      where scales and zeros start from.
    symmetric: zeros stay as they are.
    """

    position: Tensor
    grid: Grid
    symmetric: bool

    def offset(self) -> Tensor:
        """How far each weight is moved, at the start: (rows, columns) float32, zeros.

        In steps of the grid, to be kept in [-0.5, 0.5].
        """
        return torch.zeros_like(self.position)

    def clip(self) -> Tensor:
        """Factors of the ends of each group's range, at the start: all 1, float32.

        (2, rows, groups): of the lower and of the upper end; (1, rows, groups), of both, if
        symmetric.
        """
        sides = 1 if self.symmetric else 2
        return self.grid.scale.new_ones(sides, *self.grid.scale.shape)


def latent(weight: Tensor, start: Packed, *, symmetric: bool, farthest: float = FARTHEST) -> Latent:
    """Begin from a quantized matrix, whichever method made it.

    weight:   (rows, columns) float32: the original. Not modified.
    start:    of that matrix. Codes that are not the nearest are kept.
    farthest: steps from its code that a weight is taken to be, if it is further; below 0.5. The
              less, the further all must be moved before a code changes.
    """
    grid = start.grid
    codes = start.codes.float()
    grouped = weight.reshape(*grid.scale.shape, -1)
    position = grouped.div(grid.scale[..., None]).add_(grid.zero[..., None]).view_as(codes)
    position = torch.clamp(position, codes - farthest, codes + farthest)
    return Latent(position, grid, symmetric)


def decode(found: Latent, offset: Tensor, clip: Tensor) -> Tensor:
    """The weights, (rows, columns) float32, with gradients at `offset` and `clip`.

    offset, clip: as in `Latent`. Rounding passes gradients on as if it changed nothing, and
    clamping only those of what it left alone.

    Equal to `settle(...).decode()` but for its rounding to the stored type.

    Source: Cheng et al., arXiv:2309.05516, equations 3 to 5.
    """
    codes, scale, zero = _parts(found, offset, clip)
    return ((codes - zero[..., None]) * scale[..., None]).view_as(offset)


@torch.no_grad()
def settle(found: Latent, offset: Tensor, clip: Tensor) -> Packed:
    """The codes and the grid that `decode` reads."""
    codes, scale, zero = _parts(found, offset, clip)
    grid = replace(found.grid, scale=scale, zero=zero)
    return Packed(codes.view_as(offset).to(torch.uint8), grid)


def _parts(found: Latent, offset: Tensor, clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, (rows, groups, size), scale and zero, (rows, groups), all float32."""
    grid, most = found.grid, found.grid.max_code
    if found.symmetric:
        factor, zero = clip[0], grid.zero
    else:
        low, high = clip[0] * grid.zero, clip[1] * (most - grid.zero)
        factor = (low + high) / most
        zero = _through(low / factor, torch.round(low / factor)).clamp(0, most)
    exact = grid.scale * factor
    stored = storable(exact, dtype=grid.dtype, max_code=most, row_scale=grid.row_scale)
    scale = _through(exact, stored)
    # A weight stays where it is when its grid is stretched: about the zero it started from.
    steps = found.position.view(*grid.scale.shape, -1) - grid.zero[..., None]
    moved = steps * (grid.scale / scale)[..., None] + zero[..., None] + offset.view_as(steps)
    return _through(moved, moved.round()).clamp(0, most), scale, zero


def _through(value: Tensor, replacement: Tensor) -> Tensor:
    """`replacement`, to the bit, with the gradient of `value`."""
    return replacement.detach() + (value - value.detach())
