"""What a prune method chooses to remove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor

from compresso import registry
from compresso.calibration.data import Calibration, first_tokens
from compresso.calibration.statistics import BlockScores, TokenChoice, measure_blocks
from compresso.calibration.streams import Streams
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import CheckpointError, ConfigError
from compresso.kernels.selection import ascending, blocks_for_ratio, closest_run, tail
from compresso.models.adapter import ModelAdapter
from compresso.models.depth import drop_blocks
from compresso.provenance import read_record
from compresso.recipe import Step
from compresso.runtime import Runtime
from compresso.stages.prune_units import (
    Decision,
    Unit,
    cost_of,
    enough,
    free_units,
    name_of,
    sub_block_costs,
    unit_of,
)

WITHOUT_UNITS = ("manual", "contiguous", "tail")  # which take runs, or what they are told


@dataclass(frozen=True)
class Choice:
    """Everything that a method may go by."""

    step: Step
    adapter: ModelAdapter
    source: Checkpoint
    calibration: Calibration | None
    target: CheckpointWriter
    runtime: Runtime

    @property
    def settings(self) -> Any:
        return self.step.settings

    @cached_property
    def costs(self) -> list[int]:
        """Parameters of every sub-block."""
        return sub_block_costs(self.adapter, self.source)

    @cached_property
    def units(self) -> list[Unit]:
        """What the method may remove, in execution order."""
        return free_units(
            getattr(self.settings, "unit", "block"),
            self.costs,
            protect=getattr(self.settings, "protect", ()),
            keep=getattr(self.settings, "keep", ()),
        )

    @property
    def count(self) -> int | None:
        """How many units to remove, if that was asked for."""
        given = getattr(self.settings, "drop_count", None)
        return given if given is not None else getattr(self.settings, "blocks", None)

    def batches(self, tokens: int | None = None) -> list[Tensor]:
        """The first calibration batches, that hold so many tokens; all if None."""
        assert self.calibration is not None
        batches = self.calibration.batches
        return batches if tokens is None else first_tokens(batches, tokens)

    def streams(self, tokens: int) -> Streams:
        """For scoring candidates on so many calibration tokens."""
        return Streams(
            self.adapter,
            self.source,
            self.batches(tokens),
            budget=self.runtime.max_memory,
            spill_dir=self.target.partial,
        )

    def enough(self, order: Sequence[Unit]) -> list[Unit]:
        """The first units of an order that come to what was asked for."""
        return enough(
            order,
            self.costs,
            total=self.source.parameters,
            ratio=self.settings.ratio,
            count=self.count,
        )

    def reached(self, order: Sequence[Unit]) -> bool:
        """Whether a search has removed as much as was asked for."""
        if self.count is not None:
            return len(order) >= self.count
        removed = sum(cost_of(unit, self.costs) for unit in order)
        return bool(removed >= self.settings.ratio * self.source.parameters)

    def searched(
        self, order: Sequence[Unit], *, score: str, values: Sequence[float], **more: Any
    ) -> Decision:
        """What a search came to that removed units in this order, each at a score."""
        left = [unit for unit in self.units if unit not in order]
        names = [name_of(unit) for unit in order]
        return self.decide(
            [*order, *left],
            score=score,
            values=dict(zip(names, values, strict=True)),
            order=names,
            **more,
        )

    def decide(self, ranked: Sequence[Unit], **why: Any) -> Decision:
        """To remove as much as was asked for, the first first. why: fields of the decision."""
        return self.decision(self.enough(ranked), **why)

    def decision(self, units: Sequence[Unit], **why: Any) -> Decision:
        """To remove these units. why: fields of the decision."""
        removed = sorted(sub_block for unit in units for sub_block in unit)
        return Decision(self.costs, removed, **why)


def choose(choice: Choice) -> Decision:
    """What to remove.

    Raises ConfigError, before anything is measured where that can be, if the wanted amount is
    impossible or a config.json without some blocks could not be written.
    """
    adapter = choice.adapter
    drop_blocks(choice.source.config, adapter.family, list(range(adapter.count)))
    if choice.step.method not in WITHOUT_UNITS:
        choice.enough(sorted(choice.units, key=partial(cost_of, costs=choice.costs)))
    method = registry.load(registry.method("prune", choice.step.method).code)
    decision: Decision = method(choice)
    return decision


def measured(choice: Choice, *, angles: TokenChoice | None = None) -> BlockScores:
    """What the blocks do to the residual stream, as the adapter's model is now."""
    return measure_blocks(
        choice.adapter,
        choice.source,
        choice.batches(),
        angles=angles,
        runtime=choice.runtime,
        spill_dir=choice.target.partial,
    )


def turns(scores: BlockScores, units: Sequence[Unit]) -> list[float]:
    """How far each unit turns the residual stream: 1 - cosine similarity, over its tokens.

    Source: He et al., arXiv:2406.15786, equation 2.
    """
    halves = scores.attention, scores.mlp
    found = []
    for unit in units:
        block, half = divmod(unit[0], 2)
        found.append(1 - (scores.similarity if len(unit) == 2 else halves[half])[block])
    return found


def shortgpt(choice: Choice) -> Decision:
    """The blocks of lowest Block Influence. Source: Men et al., arXiv:2403.03853."""
    influence = measured(choice).influence
    return by_score(choice, "influence", [influence[unit[0] // 2] for unit in choice.units])


def at_random(choice: Choice) -> Decision:
    """Units drawn at random, from a seed."""
    draw = Random(choice.settings.seed)
    return by_score(choice, "draw", [draw.random() for _ in choice.units])


def by_score(choice: Choice, score: str, values: list[float], **why: Any) -> Decision:
    """The units of lowest score, all at once."""
    order = [choice.units[place] for place in ascending(values)]
    names = [name_of(unit) for unit in choice.units]
    return choice.decide(order, score=score, values=dict(zip(names, values, strict=True)), **why)


def contiguous(choice: Choice) -> Decision:
    """The run of blocks whose ends are closest in angle. Source: arXiv:2403.17887."""
    _blocks(choice, partial(tail, choice.adapter.count))  # of equal blocks any run removes as much
    scores = measured(choice, angles=choice.settings.tokens)
    assert scores.triangle is not None
    drop = _blocks(choice, partial(closest_run, scores.triangle))
    angles = {str(block): angle for block, angle in enumerate(scores.triangle[len(drop) - 1])}
    return choice.decision([unit_of(block) for block in drop], score="angle", values=angles)


def deepest(choice: Choice) -> Decision:
    """The deepest blocks but the last. Source: arXiv:2403.17887, section 3.2."""
    drop = _blocks(choice, partial(tail, choice.adapter.count))
    return choice.decision([unit_of(block) for block in drop])


def _blocks(choice: Choice, run: Callable[[int], list[int]]) -> list[int]:
    """The run of as many blocks as were asked for."""
    if choice.count is not None:
        return run(choice.count)
    parameters = [cost_of(unit, choice.costs) for unit in choice.units]
    total, ratio = choice.source.parameters, choice.settings.ratio
    return blocks_for_ratio(run, parameters, total=total, ratio=ratio)


def manual(choice: Choice) -> Decision:
    """What the user names, or the first of what a search removed elsewhere."""
    if choice.settings.order is not None:
        return _first_of(choice, _recorded_order(Path(choice.settings.order)))
    units = [unit_of(name) for name in choice.settings.drop]
    sub_blocks = [sub_block for unit in units for sub_block in unit]
    for sub_block in sub_blocks:
        block, name = sub_block // 2, name_of((sub_block,))
        if block >= choice.adapter.count:
            raise ConfigError(
                f"`drop`: there is no block `{block}`",
                hint=f"blocks are 0 to {choice.adapter.count - 1}",
            )
        if not choice.costs[sub_block]:
            raise ConfigError(f"`drop`: `{name}` is not in the model any more")
        if sub_blocks.count(sub_block) > 1:
            raise ConfigError(f"`drop`: `{name}` is given twice")
    return choice.decision(units)


def _first_of(choice: Choice, names: list[str]) -> Decision:
    """The first removals of a recorded order."""
    order = [unit_of(name) for name in names]
    gone = {sub_block for unit in order for sub_block in unit}
    rest = [(half,) for half, cost in enumerate(choice.costs) if cost and half not in gone]
    chosen = choice.enough([*order, *rest])
    if len(chosen) > len(order):
        raise ConfigError(
            f"`{choice.settings.order}` lost only {len(order)} units",
            hint="search again with a larger `ratio`",
        )
    return choice.decision(chosen, order=names)


def _recorded_order(path: Path) -> list[str]:
    order: list[str] = read_record(path).get("report", {}).get("summary", {}).get("order", [])
    if not order:
        raise CheckpointError(
            f"`{path}` does not say in which order it lost what it lost",
            hint="give a checkpoint made by `prune --method blockpruner`",
        )
    return order
