"""Choose how many bits every input group gets, so that the whole hits a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch

from compresso.calibration.sensitivity import noise_ledger
from compresso.calibration.statistics import measure_blocks
from compresso.errors import ConfigError
from compresso.kernels.allocation import in_order, least_damage, total, uniform
from compresso.kernels.linearity import by_importance, zd
from compresso.runtime import format_bytes, log, parse_bytes
from compresso.stages.bit_job import BitJob
from compresso.stages.bit_search import evolve

TOLERANCE = 0.005  # bits per weight: the stored shapes of linears are not worth a refusal
MEASURED = ("dp", "search")  # allocations that go by what was measured of each group


@dataclass(frozen=True)
class BitChoice:
    """What was chosen.

    bits:    of every group of every block, as `groups[block][group]` of the job.
    rows:    per group: `block`, `linears`, `bits`, `bytes`, `error` (|W' - W|^2 / |W|^2), and where
             it was measured `damage`, the KL with only this group quantized.
    summary: `bits_per_weight` of all groups, `bytes` of everything stored, `measured_kl` of the
             choice, and where known `predicted_kl`, the sum of the damages, and the `history`.
    """

    bits: list[list[int]]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def budget_of(job: BitJob) -> int:
    """Bytes that all groups may take: a target in bits counts to a hundredth, one in bytes exactly.

    Raises ConfigError, naming what can be reached, if they cannot take so many or so few.
    """
    settings, sizes = job.settings, job.sizes
    least, most = (total(sizes, [level] * len(sizes)) for level in (0, len(job.ladder.bits) - 1))
    if settings.target_bits is not None:
        budget = int((settings.target_bits + TOLERANCE) * job.count / 8)
        asked = f"`target_bits`: {settings.target_bits:g} bits per weight"
        low, high = (f"{8 * size / job.count:.4g}" for size in (least, most))
    else:
        budget = parse_bytes(settings.size) - job.other_bytes
        asked = f"`size`: {settings.size}"
        low, high = (format_bytes(size + job.other_bytes) for size in (least, most))
    if not least <= budget <= most:
        raise ConfigError(
            f"{asked} cannot be reached",
            hint=f"widths of {' '.join(map(str, job.ladder.bits))} bits with their scales come to"
            f" {low} to {high}",
        )
    return budget


@torch.no_grad()
def choose_bits(job: BitJob) -> BitChoice:
    """How many bits every group gets. A run that was killed goes on from where it was.

    Raises ConfigError, before anything is measured, if the target cannot be hit.
    """
    budget = budget_of(job)
    state = job.target.recall() or {}
    if "choice" not in state:
        state = _choose(job, budget)
        job.target.remember(state)
        job.levels.remove()
    return BitChoice(job.by_block(state["choice"]), state["rows"], state["summary"])


def _choose(job: BitJob, budget: int) -> dict[str, Any]:
    """The state of a finished choice."""
    damage: list[list[float]] | None = None
    history: list[dict[str, Any]] = []
    if job.settings.allocation in MEASURED:
        damage = _damage(job)
        chosen = least_damage(damage, job.sizes, budget)
        if job.settings.allocation == "search":
            job.build(dict.fromkeys(job.places, job.ladder.bits))
            starts = [chosen, uniform(job.sizes, budget)]
            score = partial(_score, job)
            found = evolve(starts, job.sizes, budget, score, job.target, settings=job.settings)
            chosen, history = found["parent"], found["history"]
    else:
        chosen = _baseline(job, budget)
    job.build({p: [job.ladder.bits[level]] for p, level in zip(job.places, chosen, strict=True)})
    rows = _rows(job, chosen, damage)
    summary: dict[str, Any] = {
        "allocation": job.settings.allocation,
        "bits_per_weight": 8 * total(job.sizes, chosen) / job.count,
        "bytes": job.other_bytes + total(job.sizes, chosen),
        "measured_kl": _score(job, [chosen], None, Random(0))[0],
    }
    if damage is not None:
        summary["predicted_kl"] = sum(row["damage"] for row in rows)
    if history:
        summary["history"] = history
    log(f"bits: {summary['bits_per_weight']:.4g} per weight, kl {summary['measured_kl']:.4g}")
    return {"choice": chosen, "rows": rows, "summary": summary}


def _damage(job: BitJob) -> list[list[float]]:
    """What every group costs at every width: measured, or slope times error."""
    job.build(dict.fromkeys(job.sensitivity.unknown(job.ledger), job.ladder.bits))
    direct = job.sensitivity.damage(job.levels, job.ledger)
    if job.settings.predict == "damage":
        return [direct[place] for place in job.places]
    noise = noise_ledger(job.sensitivity, job.ledger.path.parent)
    lines, errors = job.sensitivity.noise(noise), job.sensitivity.errors(job.ledger)
    return [[lines[place].slope * error for error in errors[place]] for place in job.places]


def _score(
    job: BitJob, choices: Sequence[Sequence[int]], tokens: int | None, random: Random
) -> list[float]:
    """KL of each choice from the original on so many random tokens; on all if None."""
    candidates = [
        job.levels.candidate(
            {block: tuple(widths) for block, widths in enumerate(job.by_block(chosen)) if widths}
        )
        for chosen in choices
    ]
    return job.streams.score(candidates, metric="kl", batches=job.streams.draw(tokens, random))


def _baseline(job: BitJob, budget: int) -> list[int]:
    """The same width for all groups, and the next one for those of some blocks."""
    allocation = job.settings.allocation
    if allocation == "uniform":
        return uniform(job.sizes, budget)
    if allocation == "lim":
        scores = measure_blocks(
            job.adapter,
            job.source,
            job.batches(job.settings.score_tokens),
            angles=None,
            runtime=job.runtime,
            spill_dir=job.target.partial,
        )
        importance = [-value for value in scores.similarity]
    else:
        importance = [-_zd(job, block) for block in range(job.adapter.count)]
    order = [
        number
        for block in by_importance(importance)
        for number, place in enumerate(job.places)
        if place[0] == block
    ]
    return in_order(order, job.sizes, budget)


def _zd(job: BitJob, block: int) -> float:
    names = [name for place in job.places if place[0] == block for name in job.weights(place)]
    return zd(job.source.load_weights(names).values()) if names else 0.0


def _rows(
    job: BitJob, chosen: Sequence[int], damage: list[list[float]] | None
) -> list[dict[str, Any]]:
    rows = []
    for number, (place, level) in enumerate(zip(job.places, chosen, strict=True)):
        bits = job.ladder.bits[level]
        row: dict[str, Any] = {
            "block": place[0],
            "linears": list(job.groups[place[0]][place[1]]),
            "bits": bits,
            "bytes": job.sizes[number][level],
            "error": job.levels.error(place, bits),
        }
        if damage is not None:
            row["damage"] = damage[number][level]
        rows.append(row)
    return rows
