"""Measure how much every block changes the residual stream, and say which could go."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compresso.calibration.data import Calibration
from compresso.calibration.statistics import BlockScores, measure_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.kernels.selection import blocks_for_ratio, closest_run, lowest, tail
from compresso.models.adapter import ModelAdapter
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime
from compresso.stages.heatmap import runs
from compresso.stages.plots import draw_analysis, wants_plot
from compresso.stages.prune_units import sub_block_costs

ADVISED_RATIOS = (0.1, 0.2, 0.3)
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
    distances of the runs of 1, 2, ... blocks that start there. The summary's `advice` maps ratios
    to methods to what they would drop.

    Raises ResourceError if a picture is demanded and matplotlib is missing.
    """
    plot = wants_plot(step.settings.plot)
    adapter = ModelAdapter.open(
        source,
        dtype=runtime.compute_dtype(source.dtype),
        device=runtime.device,
        trust_remote_code=runtime.trust_remote_code,
    )
    scores = measure_blocks(
        adapter,
        source,
        calibration.batches,
        angles=step.settings.tokens,
        runtime=runtime,
        spill_dir=target,
    )
    costs = sub_block_costs(adapter, source)
    parameters = [sum(costs[half : half + 2]) for half in range(0, len(costs), 2)]
    report = Report(rows=_rows(scores, parameters))
    report.summary = {
        "blocks": adapter.count,
        "parameters": source.parameters,
        "block_parameters_share": sum(parameters) / source.parameters,
        "tokens": scores.tokens,
        "angle_tokens": scores.angle_tokens,
        "advice": _advice(scores, parameters, source.parameters),
    }
    report.files["analysis"] = FILE
    if plot:
        for path in draw_analysis(report, target, title=_title(source, report, calibration)):
            report.files[path.suffix.removeprefix(".")] = path.name
    record = {
        "source": {"path": str(source.path), "key": source.key},
        "step": step.to_json(),
        "calibration": calibration.record,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        **report.to_json(),
    }
    (target / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return report


def _title(source: Checkpoint, report: Report, calibration: Calibration) -> str:
    return (
        f"{source.path.name}: {report.summary['blocks']} blocks, {source.parameters / 1e6:,.1f} M"
        f" parameters; on {report.summary['tokens']:,} tokens of"
        f" {Path(calibration.record['dataset']).name}"
    )


def _rows(scores: BlockScores, parameters: list[int]) -> list[dict[str, Any]]:
    assert scores.triangle is not None
    return [
        {
            "block": block,
            "influence": scores.influence[block],
            "attention": scores.attention[block],
            "mlp": scores.mlp[block],
            "parameters": count,
            "angles": [runs[block] for runs in scores.triangle if block < len(runs)],
        }
        for block, count in enumerate(parameters)
    ]


def _advice(scores: BlockScores, parameters: list[int], total: int) -> dict[str, Any]:
    """Ratio -> method -> the blocks it would drop, and the damage that the scores predict.

    influence: summed over the blocks. angle: summed over the runs that they form. Or `impossible`
    and the reason, where no number of blocks is near the ratio.
    """
    assert scores.triangle is not None
    methods: dict[str, Callable[[int], list[int]]] = {
        "shortgpt": partial(lowest, scores.influence),
        "contiguous": partial(closest_run, scores.triangle),
        "tail": partial(tail, len(parameters)),
    }
    advice: dict[str, Any] = {}
    for ratio in ADVISED_RATIOS:
        choices: dict[str, Any] = {}
        advice[f"{ratio:.0%}"] = choices
        for method, choose in methods.items():
            try:
                drop = sorted(blocks_for_ratio(choose, parameters, total=total, ratio=ratio))
            except ConfigError as error:
                choices[method] = {"impossible": str(error).removeprefix("`ratio`: ")}
                continue
            choices[method] = {
                "drop": drop,
                "share": sum(parameters[block] for block in drop) / total,
                "influence": sum(scores.influence[block] for block in drop),
                "angle": sum(scores.triangle[len(run) - 1][run[0]] for run in runs(drop)),
            }
    return advice
