"""Choices by what weights, gradients or trained gates say of every unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from compresso.calibration.gates import train_gates
from compresso.calibration.importance import magnitude_scores, taylor_scores
from compresso.errors import ConfigError
from compresso.stages.prune_choice import Choice, by_score
from compresso.stages.prune_units import Decision, Unit, cost_of, free_units


def taylor(choice: Choice) -> Decision:
    """The units of least first-order effect on the loss, sum |w dL/dw|.

    Source: Ma et al., arXiv:2305.11627, equation 5, element by element.
    """
    scores = taylor_scores(
        choice.adapter,
        choice.source,
        choice.batches(choice.settings.score_tokens),
        runtime=choice.runtime,
        spill_dir=choice.target.partial,
    )
    return by_score(choice, "taylor", _summed(scores, choice.units))


def magnitude(choice: Choice) -> Decision:
    """The units of least sum |w|."""
    scores = magnitude_scores(choice.adapter, choice.source)
    return by_score(choice, "magnitude", _summed(scores, choice.units))


def foldgpt(choice: Choice) -> Decision:
    """The units whose trained gates are least often open; see `calibration.gates`.

    All units are gated, so that the budget means the same with and without protected ones.
    """
    settings, costs = choice.settings, choice.costs
    if not choice.adapter.structure.plain:
        raise ConfigError(
            f"`{choice.source.path}` lacks parts of blocks already",
            hint="use `--method blockpruner`, or gate the original",
        )
    gated = free_units(settings.unit, costs, protect=(), keep=())
    cheapest = choice.enough(sorted(choice.units, key=lambda unit: cost_of(unit, costs)))
    removed, all_of_them = (
        sum(cost_of(unit, costs) for unit in units) for units in (cheapest, gated)
    )
    result = train_gates(
        choice.source,
        choice.batches(),
        unit=settings.unit,
        remove_share=removed / all_of_them,
        steps=settings.steps,
        rate=settings.rate,
        seed=settings.seed,
        runtime=choice.runtime,
        recall=choice.target.recall,
        remember=choice.target.remember,
    )
    gates = dict(zip(gated, result.gates, strict=True))
    history = [asdict(record) for record in result.history]
    return by_score(choice, "gate", [gates[unit] for unit in choice.units], history=history)


def _summed(scores: Sequence[float], units: Sequence[Unit]) -> list[float]:
    return [sum(scores[sub_block] for sub_block in unit) for unit in units]
