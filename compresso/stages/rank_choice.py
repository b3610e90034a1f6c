"""Choose how high a rank every linear's correction gets, so that all of them fit a budget."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from compresso.calibration.following import Following
from compresso.calibration.states import States
from compresso.calibration.walk import walk_blocks
from compresso.errors import placed
from compresso.kernels.allocation import spread
from compresso.kernels.decomposition import Fisher
from compresso.kernels.lowrank import energies
from compresso.runtime import track
from compresso.stages.compensate_plan import Plan, check_budget
from compresso.stages.compensate_work import Sought, Work


def choose_ranks(
    work: Work,
    plan: Plan,
    states: States,
    following: Following | None,
    fisher: Mapping[str, Fisher],
) -> dict[str, int]:
    """The rank of every linear's correction, by name in the checkpoint.

    fisher: of the original's linears, by name there; empty if corrections are not weighted.

    A rank is worth what it takes off the mean squared error of the output, times the mean squared
    gradient of the loss by the output. That is the mean of the Fisher matrix over the mean square
    of the inputs, if these and the gradients are independent. Without, it is worth the share of the
    weight's square that it takes off its error.

    Raises ConfigError if the budget is too small for any linear that lacks something.

    Source: the independence is that of Martens and Grosse, arXiv:1503.05671 (K-FAC).
    """
    pair = plan.pair
    gains: dict[str, Tensor] = {}
    blocks = walk_blocks(pair.adapter, pair.source, states)
    for block in track(blocks, pair.adapter.count, "measure ranks"):
        if following is not None:
            following.follow(block.index, keep=True)
        for sought in work.seek(block, following):
            with placed(f"`{sought.name}`"):
                found = energies(sought.change, sought.gram)
            own = fisher[pair.origin(block.index, sought.path)] if fisher else None
            gains[sought.name] = found * _worth(sought, own)
    costs = [sum(plan.shapes[name]) * pair.source.dtype.itemsize for name in gains]
    lacking = [one for one, gain in zip(costs, gains.values(), strict=True) if bool(gain.any())]
    check_budget(plan.budget, lacking)
    found_ranks = spread(list(gains.values()), costs, plan.budget)
    return dict.fromkeys(plan.shapes, 0) | dict(zip(gains, found_ranks, strict=True))


def _worth(sought: Sought, fisher: Fisher | None) -> Tensor:
    """Of a unit of the squared error of a linear."""
    if fisher is None or sought.gram is None:
        return (1 / (sought.weight + sought.change).square().sum()).nan_to_num(posinf=0.0)
    gradients = fisher.rows.square().mean()
    return (gradients / sought.gram.diagonal().mean()).nan_to_num(posinf=0.0)
