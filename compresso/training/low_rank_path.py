"""A trained correction of low rank beside a linear."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from compresso.kernels.lowrank import LowRank
from compresso.training.processes import whole


class LowRankPath(nn.Module):
    """What a linear's correction adds to its output: scale * up(down(x)).

    Both factors are float32 parameters, which an optimizer can move by little, and are rounded to
    the type of x where they are used.

    down:   (rank, in), or (rank, groups) if pooled. up: (out, rank). scale: what their product
            counts.
    pooled: neighbouring inputs that are added up before `down`; 1 for none.
    """

    def __init__(
        self,
        start: LowRank,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        pooled: int = 1,
        device: torch.device,
    ) -> None:
        """start: the correction to begin with. Not modified.

        dropout: share of inputs left out at random while in training mode.
        """
        super().__init__()
        down = start.down.to(device, torch.float32, copy=True)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(start.up.to(device, torch.float32) / scale)
        self.scale = scale
        self.pooled = pooled
        self._dropout = dropout

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        """The output plus the correction.

        inputs: (..., in). output: of the linear, (..., out). Neither is modified.
        """
        if self._dropout:
            inputs = nn.functional.dropout(inputs, self._dropout, self.training)
        if self.pooled > 1:
            inputs = inputs.unflatten(-1, (-1, self.pooled)).sum(-1)
        down, up = (self.scale * self.down).to(inputs.dtype), self.up.to(inputs.dtype)
        narrow = inputs.flatten(0, -2) @ down.T
        return torch.addmm(output.flatten(0, -2), narrow, up.T).view_as(output)

    def low_rank(self) -> LowRank:
        """The correction, scale included, on the CPU; a copy.

        If it is split among processes, all of them have to ask.
        """
        up, down = whole(self.up.detach()), whole(self.down.detach())
        return LowRank((up * self.scale).cpu(), down.cpu().clone())


def nothing_yet(rows: int, columns: int, rank: int, generator: torch.Generator) -> LowRank:
    """A correction to begin with: `up` is zero, and `down` uniform as a new linear's weight.

    Source: Hu et al., arXiv:2106.09685, with the bounds that their code and peft use.
    """
    bound = 1 / math.sqrt(columns)
    down = torch.rand(rank, columns, generator=generator).mul_(2 * bound).sub_(bound)
    return LowRank(torch.zeros(rows, rank), down)
