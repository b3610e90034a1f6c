"""Which blocks share weights, and how well each is corrected."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import floor, prod
from typing import Any

from compresso import registry
from compresso.calibration.candidates import Candidate
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.kernels.lowrank import correction_parameters, rank_within
from compresso.kernels.selection import blocks_for_ratio
from compresso.kernels.sharing import (
    Run,
    average,
    cheapest_groups,
    lower,
    runs,
    stepwise,
    stepwise_from_start,
)
from compresso.models.adapter import ModelAdapter
from compresso.runtime import log
from compresso.stages.prune_choice import Choice
from compresso.stages.prune_units import free_units

AT_ONCE = 32  # candidates scored in one walk, which all have hidden states of their own
SLOTS = {
    "stepwise": stepwise,
    "stepwise-start": stepwise_from_start,
    "average": average,
    "lower": lower,
}


@dataclass(frozen=True)
class Plan:
    """What a model becomes, in plain values.

    uses:      for every block, the block that stores the linears it uses: the first that does.
    made_from: for every block, the blocks of the source whose mean these linears are.
    rank:      of the corrections of every linear of a block that lost its own; 0 for none.
    damage:    of every block in a group, what its group alone is predicted to cost, in nats per
               token of KL.
    facts:     more for the summary.
    """

    uses: list[int]
    made_from: list[list[int]]
    rank: int = 0
    damage: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def corrected(self) -> list[int]:
        """The blocks with corrections, ascending."""
        return [b for b, blocks in enumerate(self.made_from) if self.rank and blocks != [b]]


def make_plan(choice: Choice) -> Plan:
    """The plan of a step, which is remembered: a restarted run measures nothing again.

    Raises ConfigError, before anything is measured, if the wanted amount is impossible.
    """
    state = choice.target.recall() or {}
    if "plan" in state:
        return Plan(**state["plan"])
    method = registry.load(registry.method("fold", choice.step.method).code)
    plan: Plan = method(choice, Sizes.of(choice.adapter, choice.source))
    choice.target.remember({"plan": asdict(plan)})
    return plan


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, all blocks of which have the same shapes.

    blocks: how many. shapes: of the weights of a block's linears. biases: parameters of a block's
    linears that are no weights. total: of the whole model.
    """

    blocks: int
    shapes: list[tuple[int, int]]
    biases: int
    total: int

    @classmethod
    def of(cls, adapter: ModelAdapter, source: Checkpoint) -> Sizes:
        """Those of `source`."""
        prefix = adapter.block_prefix(0)
        shapes = [source.weight_info(f"{prefix}{name}").shape for name in linear_tensors(adapter)]
        return cls(
            adapter.count,
            [(shape[0], shape[1]) for shape in shapes if len(shape) == 2],
            sum(shape[0] for shape in shapes if len(shape) == 1),
            source.parameters,
        )

    @property
    def linears(self) -> int:
        """Parameters of the linears of a block."""
        return sum(map(prod, self.shapes)) + self.biases

    def correction(self, rank: int) -> int:
        """Parameters of the corrections of a block."""
        return correction_parameters(self.shapes, rank=rank) + (self.biases if rank else 0)

    def rank_in(self, parameters: float, *, corrected: int) -> int:
        """The highest rank at which corrections of so many blocks fit so many parameters."""
        room = floor(parameters) - corrected * self.biases
        return rank_within(self.shapes * corrected, parameters=room)

    def check_rank(self, rank: int, *, corrected: int, removed: int) -> None:
        """Raises ConfigError if corrections of so many blocks take what the removed ones free."""
        freed = removed * self.linears
        if rank and corrected * self.correction(rank) >= freed:
            most = self.rank_in(freed - 1, corrected=corrected)
            raise ConfigError(
                f"`rank`: corrections of rank {rank} take all that sharing frees",
                hint=f"use a rank far below {most + 1}",
            )

    def rank_for(self, ratio: float, *, corrected: int, removed: int) -> int:
        """The highest rank at which that share of all parameters goes, to the parameter.

        Raises ConfigError, naming the largest possible ratio, if there is none.
        """
        room = removed * self.linears - ratio * self.total
        rank = self.rank_in(room, corrected=corrected)
        if rank == 0:
            most = removed * self.linears - corrected * self.correction(1)
            raise ConfigError(
                f"`ratio`: {ratio} leaves no room for corrections",
                hint=f"the largest possible ratio is {max(0, most) / self.total:.4f},"
                " unless fewer sets of weights are shared",
            )
        return min(rank, max(min(shape) for shape in self.shapes))


def linear_tensors(adapter: ModelAdapter) -> list[str]:
    """Names within a block, of any, of its linears' tensors in the checkpoint."""
    linears = tuple(f"{path}." for path in adapter.family.all_linears)
    prefix = adapter.block_prefix(0)
    names = [name.removeprefix(prefix) for name in adapter.block_tensors(0)]
    return [name for name in names if name.startswith(linears)]


def looped(choice: Choice, sizes: Sizes) -> Plan:
    """A short stack of blocks, run over and over. Source: Bae et al., arXiv:2410.20672."""
    settings, blocks = choice.settings, sizes.blocks
    slots = settings.slots if settings.slots is not None else -(-blocks // settings.loops)
    init = settings.init or ("average" if settings.rank or settings.ratio else "stepwise")
    sources = SLOTS[init](blocks, slots)
    uses = [block % slots for block in range(blocks)]
    made_from = [list(sources[slot]) for slot in uses]
    changed = sum(origin != [block] for block, origin in enumerate(made_from))
    rank = settings.rank
    if settings.ratio is None:
        sizes.check_rank(rank, corrected=changed, removed=blocks - slots)
    else:
        rank = sizes.rank_for(settings.ratio, corrected=changed, removed=blocks - slots)
    return Plan(uses, made_from, rank, facts={"slots": slots, "init": init})


def grouped(choice: Choice, sizes: Sizes) -> Plan:
    """Runs of adjacent blocks that use the linears of the member by which they lose least.

    Every member of every allowed run is tried for it, on its own and without corrections; of all
    choices of runs that free enough, the one with the least sum is taken.

    Source: Liu et al., arXiv:2407.00928, for groups that share weights but not norms; how to choose
    them is ours.
    """
    settings, blocks = choice.settings, sizes.blocks
    sizes.check_rank(settings.rank, corrected=1, removed=1)
    removed = _removed(settings, sizes)
    allowed = _allowed(settings, blocks)
    # What cannot be is refused before anything is measured.
    cheapest_groups(dict.fromkeys(allowed, 0.0), blocks=blocks, removed=removed)
    streams = choice.streams(settings.score_tokens)
    tried = [(run, member) for run in allowed for member in run.blocks]
    candidates = [Candidate(borrowed=_borrowed(*attempt)) for attempt in tried]
    values: list[float] = (choice.target.recall() or {}).get("damage", [])
    while len(values) < len(tried):
        values += streams.score(candidates[len(values) :][:AT_ONCE], metric="kl")
        choice.target.remember({"damage": values})
        log(f"fold-foldgpt: {len(values)} of {len(tried)} ways to share tried")
    damage: dict[Run, float] = {}
    best: dict[Run, int] = {}
    for (run, member), value in zip(tried, values, strict=True):
        if run not in damage or value < damage[run]:
            damage[run], best[run] = value, member
    groups = cheapest_groups(damage, blocks=blocks, removed=removed)
    group = {block: run for run in groups for block in run.blocks}
    borrowed = tuple(pair for run in groups for pair in _borrowed(run, best[run]))
    return Plan(
        [group[block].first if block in group else block for block in range(blocks)],
        [[best[group[block]] if block in group else block] for block in range(blocks)],
        settings.rank,
        {str(block): damage[run] for run in groups for block in run.blocks},
        {
            "groups": [f"{run.first}-{run.blocks[-1]}" for run in groups],
            "predicted_kl": sum(damage[run] for run in groups),
            "measured_kl": streams.score([Candidate(borrowed=borrowed)], metric="kl")[0],
        },
    )


def _removed(settings: Any, sizes: Sizes) -> int:
    """How many blocks are to lose their linears."""
    if settings.blocks is not None:
        return int(settings.blocks)
    saved = [sizes.linears - sizes.correction(settings.rank)] * sizes.blocks
    chosen = blocks_for_ratio(
        lambda count: list(range(count)), saved, total=sizes.total, ratio=settings.ratio
    )
    return len(chosen)


def _allowed(settings: Any, blocks: int) -> list[Run]:
    """The runs that may become groups, those that start alike together: they share most work."""
    units = free_units("block", [1] * 2 * blocks, protect=settings.protect, keep=settings.keep)
    free = {unit[0] // 2 for unit in units}
    return sorted(runs(blocks, largest=settings.max_group, protected=set(range(blocks)) - free))


def _borrowed(run: Run, member: int) -> tuple[tuple[int, int], ...]:
    return tuple((block, member) for block in run.blocks if block != member)
