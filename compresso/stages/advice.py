"""What every prune method would remove, and the damage that is predicted for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from compresso.calibration.candidates import Candidate
from compresso.calibration.statistics import BlockScores
from compresso.calibration.streams import Streams
from compresso.errors import ConfigError
from compresso.kernels.allocation import least_damage, total, uniform
from compresso.kernels.selection import ascending, blocks_for_ratio, closest_run, lowest, tail
from compresso.stages.heatmap import runs
from compresso.stages.prune_units import Unit, cost_of, name_of, unit_of

SOME_RATIOS = (0.1, 0.2, 0.3)
TARGET_BITS = (2.5, 3.0, 3.5, 4.0)
ALL_RATIOS = tuple(percent / 100 for percent in range(5, 55, 5))


def measure_damage(streams: Streams, blocks: int) -> dict[str, dict[str, float]]:
    """Unit -> what the model without it has, `loss` and `kl`; the whole model under ``.

    Units are every attention, every MLP and every block, alone.
    """
    units: list[Unit] = [(), *((half,) for half in range(2 * blocks)), *map(unit_of, range(blocks))]
    found = streams.measure([Candidate(frozenset(unit)) for unit in units], ("loss", "kl"))
    names = ["", *map(name_of, units[1:])]
    return {name: dict(scores) for name, scores in zip(names, found, strict=True)}  # type: ignore[arg-type]


def make_advice(
    scores: BlockScores,
    costs: Sequence[int],
    *,
    total: int,
    ratios: Sequence[float],
    damage: dict[str, dict[str, float]] | None,
) -> dict[str, Any]:
    """Ratio -> method -> what it would drop, the share that is, and the damage predicted.

    costs:  parameters of every sub-block. total: of the model.
    damage: as `measure_damage` gives it.

    influence: summed over the blocks. angle: summed over the runs that they form. kl: summed over
    the units, where that was measured. Or `impossible` and the reason.
    """
    advice: dict[str, Any] = {}
    for ratio in ratios:
        choices: dict[str, Any] = {}
        advice[f"{ratio:.0%}"] = choices
        for method, (units, choose) in _methods(scores, len(costs) // 2, damage).items():
            parameters = [cost_of(unit, costs) for unit in units]
            try:
                places = blocks_for_ratio(choose, parameters, total=total, ratio=ratio)
            except ConfigError as error:
                choices[method] = {"impossible": str(error).removeprefix("`ratio`: ")}
                continue
            dropped = [units[place] for place in sorted(places)]
            choices[method] = _predict(scores, dropped, damage)
            choices[method]["share"] = sum(cost_of(unit, costs) for unit in dropped) / total
    return advice


def advise_bits(
    damage: Sequence[Sequence[float]], sizes: Sequence[Sequence[int]], weights: int
) -> dict[str, Any]:
    """Bits per weight -> the level of every group, and the damage predicted, were it to add up.

    damage:  KL with each group alone at each level. sizes: bytes of the same.
    weights: of all groups. Targets that no level can hit are left out.
    """
    advice: dict[str, Any] = {}
    for bits in TARGET_BITS:
        budget = int(bits * weights / 8)
        if total(sizes, [0] * len(sizes)) <= budget:
            levels = least_damage(damage, sizes, budget)
            lost = sum(group[level] for group, level in zip(damage, levels, strict=True))
            same = uniform(sizes, budget)
            advice[f"{bits:g}"] = {
                "levels": levels,
                "kl": lost,
                "kl_uniform": sum(group[level] for group, level in zip(damage, same, strict=True)),
            }
    return advice


def _methods(
    scores: BlockScores, blocks: int, damage: dict[str, dict[str, float]] | None
) -> dict[str, tuple[list[Unit], Callable[[int], list[int]]]]:
    """Method -> its units, and its choice of so many of them."""
    assert scores.triangle is not None
    whole = [unit_of(block) for block in range(blocks)]
    halves: list[Unit] = [(half,) for half in range(2 * blocks)]
    similarity = [scores.attention, scores.mlp]
    turns = [1 - similarity[half % 2][half // 2] for (half,) in halves]
    methods: dict[str, tuple[list[Unit], Callable[[int], list[int]]]] = {
        "shortgpt": (whole, partial(lowest, scores.influence)),
        "contiguous": (whole, partial(closest_run, scores.triangle)),
        "tail": (whole, partial(tail, blocks)),
        "llm-drop": (halves, lambda count: ascending(turns)[:count]),
    }
    if damage is not None:
        lost = [damage[name_of(unit)]["loss"] for unit in halves]
        methods["least damage"] = halves, lambda count: ascending(lost)[:count]
    return methods


def _predict(
    scores: BlockScores, dropped: list[Unit], damage: dict[str, dict[str, float]] | None
) -> dict[str, Any]:
    assert scores.triangle is not None
    found: dict[str, Any]
    if all(len(unit) == 2 for unit in dropped):
        blocks = [unit[0] // 2 for unit in dropped]
        found = {
            "drop": blocks,
            "influence": sum(scores.influence[block] for block in blocks),
            "angle": sum(scores.triangle[len(run) - 1][run[0]] for run in runs(blocks)),
        }
    else:
        found = {"drop": [name_of(unit) for unit in dropped]}
    if damage is not None:
        found["kl"] = sum(damage[name_of(unit)]["kl"] for unit in dropped)
    return found
