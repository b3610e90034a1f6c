"""Measure how much every block changes the residual stream, and say which could go."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.metadata import version
from math import exp
from pathlib import Path
from typing import Any

import torch

from compresso.calibration.data import Calibration, first_tokens
from compresso.calibration.opening import open_adapter
from compresso.calibration.pairs import compare_blocks
from compresso.calibration.statistics import BlockScores, measure_blocks
from compresso.calibration.streams import Streams
from compresso.checkpoint.reader import Checkpoint
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime
from compresso.settings import AnalyzeSettings
from compresso.stages.advice import ALL_RATIOS, SOME_RATIOS, make_advice, measure_damage
from compresso.stages.group_damage import Measured, add_sensitivity
from compresso.stages.plots import draw_analysis, draw_pairs, wants_plot
from compresso.stages.prune_units import sub_block_costs

FILE = "analysis.json"


@torch.no_grad()
def analyze(
    source: Checkpoint,
    step: Step,
    calibration: Calibration,
    target: Path,
    runtime: Runtime,
) -> Report:
    """Measure every block in one walk, and work out what every pruning method would drop.

    target: the directory to write analysis.json, and the picture if there is one, to.

    Reports a row per block: `influence` (Block Influence), `attention` and `mlp` (similarity of
    the residual stream before and after either half), `parameters`, and `angles`, the angular
    distances of the runs of 1, 2, ... blocks that start there; with `damage` also perplexity and KL
    without the block and without either half; with `sensitivity` what the noise and the widths
    cost its input groups, which the summary's `sensitivity` has for each. The summary's `advice`
    maps ratios to methods to what they would drop; with `pairs`, `pairs` has how alike every two
    blocks are.

    Raises ResourceError if a picture is demanded and matplotlib is missing.
    """
    plot = wants_plot(step.settings.plot)
    adapter = open_adapter(source, runtime)
    settings: AnalyzeSettings = step.settings
    scores = measure_blocks(
        adapter,
        source,
        calibration.batches,
        angles=settings.tokens,
        runtime=runtime,
        spill_dir=target,
    )
    some = first_tokens(calibration.batches, settings.score_tokens)
    damage = None
    if settings.damage:
        streams = Streams(adapter, source, some, budget=runtime.max_memory, spill_dir=target)
        damage = measure_damage(streams, adapter.count)
    costs = sub_block_costs(adapter, source)
    report = Report(rows=_rows(scores, costs, damage))
    report.summary = _summary(scores, costs, source, settings, damage)
    if settings.pairs:
        pairs = compare_blocks(adapter, source, some, runtime=runtime, spill_dir=target)
        report.summary["pairs"] = asdict(pairs)
    if settings.sensitivity:
        measured = Measured(adapter, source, calibration, target, runtime)
        add_sensitivity(report, measured, settings)
    report.files["analysis"] = FILE
    if plot:
        title = _title(source, report, calibration)
        for path in draw_analysis(report, target, title=title):
            report.files[path.suffix.removeprefix(".")] = path.name
        if settings.pairs:
            path = draw_pairs(report.summary["pairs"], target, title=title)
            report.files["pairs"] = path.name
    _write(report, source, step, calibration, target)
    return report


def _summary(
    scores: BlockScores,
    costs: list[int],
    source: Checkpoint,
    settings: AnalyzeSettings,
    damage: dict[str, dict[str, float]] | None,
) -> dict[str, Any]:
    return {
        "blocks": len(costs) // 2,
        "parameters": source.parameters,
        "block_parameters_share": sum(costs) / source.parameters,
        "tokens": scores.tokens,
        "angle_tokens": scores.angle_tokens,
        "advice": make_advice(
            scores,
            costs,
            total=source.parameters,
            ratios=ALL_RATIOS if settings.advise else SOME_RATIOS,
            damage=damage,
        ),
    }


def _write(
    report: Report, source: Checkpoint, step: Step, calibration: Calibration, target: Path
) -> None:
    """Write all there is to know as JSON."""
    record = {
        "source": {"path": str(source.path), "key": source.key},
        "step": step.to_json(),
        "calibration": calibration.record,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        **report.to_json(),
    }
    (target / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _title(source: Checkpoint, report: Report, calibration: Calibration) -> str:
    return (
        f"{source.path.name}: {report.summary['blocks']} blocks, {source.parameters / 1e6:,.1f} M"
        f" parameters; on {report.summary['tokens']:,} tokens of"
        f" {Path(calibration.record['dataset']).name}"
    )


def _rows(
    scores: BlockScores, costs: list[int], damage: dict[str, dict[str, float]] | None
) -> list[dict[str, Any]]:
    assert scores.triangle is not None
    rows: list[dict[str, Any]] = []
    for block, influence in enumerate(scores.influence):
        row: dict[str, Any] = {
            "block": block,
            "influence": influence,
            "attention": scores.attention[block],
            "mlp": scores.mlp[block],
            "parameters": sum(costs[2 * block : 2 * block + 2]),
        }
        if damage is not None:
            for half, name in (
                ("attention", f"a{block}"),
                ("mlp", f"m{block}"),
                ("block", f"{block}"),
            ):
                row[f"ppl_without_{half}"] = exp(damage[name]["loss"])
                row[f"kl_without_{half}"] = damage[name]["kl"]
        row["angles"] = [runs[block] for runs in scores.triangle if block < len(runs)]
        rows.append(row)
    return rows
