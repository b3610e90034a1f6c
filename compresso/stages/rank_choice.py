"""Choose how high a rank every linear's correction gets, so that all of them fit a budget."""

from __future__ import annotations

from torch import Tensor

from compresso.calibration.following import Following
from compresso.calibration.states import States
from compresso.calibration.walk import walk_blocks
from compresso.errors import placed
from compresso.kernels.allocation import spread
from compresso.kernels.gptq import relative_error
from compresso.kernels.lowrank import energies
from compresso.runtime import track
from compresso.stages.compensate_plan import Plan, check_budget
from compresso.stages.compensate_work import Work


def choose_ranks(
    work: Work, plan: Plan, states: States, following: Following | None
) -> dict[str, int]:
    """The rank of every linear's correction, by name in the checkpoint.

    Raises ConfigError if the budget is too small for any linear that lacks something.
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
            wanted = sought.weight + sought.change
            share = relative_error(wanted, sought.weight, sought.gram)
            gains[sought.name] = found * (share / found.sum()).nan_to_num()
    costs = [sum(plan.shapes[name]) * pair.source.dtype.itemsize for name in gains]
    lacking = [one for one, gain in zip(costs, gains.values(), strict=True) if bool(gain.any())]
    check_budget(plan.budget, lacking)
    found_ranks = spread(list(gains.values()), costs, plan.budget)
    return dict.fromkeys(plan.shapes, 0) | dict(zip(gains, found_ranks, strict=True))
