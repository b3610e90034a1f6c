"""Choose how many bits every input group gets by what decompositions leave: LQ-LoRA's program."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from compresso.calibration.levels import Place
from compresso.kernels.allocation import least_damage, total
from compresso.kernels.decomposition import Fisher, quantize
from compresso.runtime import log, track
from compresso.stages.bit_choice import BitChoice, budget_of
from compresso.stages.bit_job import BitJob
from compresso.stages.quantize_plan import options_of


@torch.no_grad()
def choose_by_error(job: BitJob, fisher: Mapping[str, Fisher]) -> BitChoice:
    """The bits at which the errors of all weights sum to the least, by a Fisher matrix if known.

    fisher: of linears, by name in the checkpoint; of those that have none, errors count alike.

    Every group is decomposed at every width. A run that was killed goes on after the choice.

    Raises ConfigError, before anything is measured, if the target cannot be hit.

    Source: Guo et al., arXiv:2311.12023, section 3.3, over widths alone.
    """
    budget = budget_of(job)
    state = job.target.recall() or {}
    if "choice" not in state:
        state = _choose(job, fisher, budget)
        job.target.remember(state)
    return BitChoice(job.by_block(state["choice"]), state["rows"], state["summary"])


def _choose(job: BitJob, fisher: Mapping[str, Fisher], budget: int) -> dict[str, Any]:
    """The state of a finished choice."""
    found = [
        [_left(job, fisher, place, bits) for bits in job.ladder.bits]
        for place in track(job.places, len(job.places), "decompose")
    ]
    damage = [[loss for loss, _ in own] for own in found]
    chosen = least_damage(damage, job.sizes, budget)
    rows: list[dict[str, Any]] = [
        {
            "block": place[0],
            "linears": list(job.groups[place[0]][place[1]]),
            "bits": job.ladder.bits[level],
            "bytes": job.sizes[number][level],
            "error": found[number][level][1],
            "damage": damage[number][level],
        }
        for number, (place, level) in enumerate(zip(job.places, chosen, strict=True))
    ]
    summary = {
        "allocation": "error",
        "bits_per_weight": 8 * total(job.sizes, chosen) / job.count,
        "bytes": job.other_bytes + total(job.sizes, chosen),
        "predicted_loss": sum(row["damage"] for row in rows),
    }
    log(f"bits: {summary['bits_per_weight']:.4g} per weight")
    return {"choice": chosen, "rows": rows, "summary": summary}


def _left(
    job: BitJob, fisher: Mapping[str, Fisher], place: Place, bits: int
) -> tuple[float, float]:
    """What a group's linears lose at a width, and the squared error that this is of its square."""
    options = options_of(quantize, {k: v for k, v in asdict(job.settings).items() if k != "bits"})
    loss = error = whole = 0.0
    for name in job.weights(place):
        stored = job.source.load_weights([name])[name]
        turned = stored.T if job.adapter.family.transposed else stored
        weight = turned.to(job.adapter.device, torch.float32)
        importance = fisher.get(name.removesuffix(".weight"))
        own = {**options, "rank": min(options["rank"], *weight.shape), "importance": importance}
        found = quantize(weight, bits=bits, scale_dtype=job.source.dtype, **own)
        rest = weight - found.decode()
        loss += rest.square().sum().item() if importance is None else importance.loss(rest)
        error += rest.square().sum().item()
        whole += weight.square().sum().item()
    return loss, error / whole if whole else 0.0
