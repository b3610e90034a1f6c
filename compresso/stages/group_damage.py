"""What an analysis says of every input group: how much noise in it costs, and fewer bits."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from compresso import registry
from compresso.calibration.data import Calibration, first_tokens
from compresso.calibration.levels import Levels, places, weight_names
from compresso.calibration.sensitivity import Sensitivity, damage_ledger, noise_ledger
from compresso.checkpoint.layout import METHOD
from compresso.checkpoint.reader import Checkpoint
from compresso.models.adapter import ModelAdapter
from compresso.report import Report
from compresso.runtime import Runtime
from compresso.settings import AnalyzeSettings
from compresso.stages.advice import advise_bits
from compresso.stages.ladder import group_bytes, make_ladder
from compresso.stages.quantize_plan import make_plan


@dataclass(frozen=True)
class Measured:
    """What is measured, on what and where. target: directory of the analysis."""

    adapter: ModelAdapter
    source: Checkpoint
    calibration: Calibration
    target: Path
    runtime: Runtime


def add_sensitivity(report: Report, of: Measured, settings: AnalyzeSettings) -> None:
    """Add `sensitivity`, a row per input group, and `bits` to the summary; sums to the blocks.

    Of a group: `slope` in nats per relative squared error and its `fit`, R^2; and `kl_B` and
    `error_B`, the divergence with only this group at B bits and the error this makes. `bits` is as
    `advise_bits` gives it. What was measured stays beside the analysis, for later runs.

    Raises ConfigError as `make_plan` does.
    """
    method = registry.method("quantize", settings.quantizer).settings(
        group_size=settings.group_size, pack=not of.adapter.family.transposed
    )
    groups = make_plan(of.adapter, method, packed_as=METHOD).groups
    ladder = make_ladder(settings.quantizer, method, of.source.dtype)
    levels = Levels(of.target / "levels", of.adapter, of.source, groups, ladder, key="analysis")
    sensitivity = Sensitivity(
        of.adapter,
        of.source,
        groups,
        first_tokens(of.calibration.batches, settings.sensitivity_tokens),
        runtime=of.runtime,
        spill_dir=of.target,
    )
    beside = of.target.parent
    lines = sensitivity.noise(noise_ledger(sensitivity, beside))
    ledger = damage_ledger(sensitivity, levels, beside, calibration=of.calibration.key)
    levels.build(
        dict.fromkeys(sensitivity.unknown(ledger), ladder.bits),
        of.calibration.batches,
        runtime=of.runtime,
        spill_dir=of.target,
    )
    damage, errors = sensitivity.damage(levels, ledger), sensitivity.errors(ledger)
    levels.remove()
    rows: list[dict[str, Any]] = []
    for place in places(groups):
        names = weight_names(of.adapter, groups, place)
        row: dict[str, Any] = {
            "block": place[0],
            "linears": list(groups[place[0]][place[1]]),
            "parameters": sum(prod(of.source.weight_info(name).shape) for name in names),
            "slope": lines[place].slope,
            "fit": lines[place].fit,
        }
        row |= {f"kl_{b}": kl for b, kl in zip(ladder.bits, damage[place], strict=True)}
        row |= {f"error_{b}": error for b, error in zip(ladder.bits, errors[place], strict=True)}
        rows.append(row)
    for block in report.rows:
        own = [row for row in rows if row["block"] == block["block"]]
        for key in ("slope", *(f"kl_{bits}" for bits in ladder.bits)):
            block[key] = sum(row[key] for row in own)
    report.summary["sensitivity"] = rows
    report.summary["bits"] = advise_bits(
        [damage[place] for place in places(groups)],
        group_bytes(ladder, of.adapter, of.source, groups),
        sum(row["parameters"] for row in rows),
    )
