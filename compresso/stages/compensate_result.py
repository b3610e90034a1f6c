"""What a compensated checkpoint holds, once all of its parts are committed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compresso.calibration.states import States
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.report import Report
from compresso.stages.compensate_forms import KeptFactors
from compresso.stages.pair import Pair

MEANS = ("output_error_before", "output_error", "weight_error_before", "weight_error")


def commit_outside(pair: Pair, target: CheckpointWriter) -> None:
    """Commit what is in no block, as it is in the source."""
    target.commit(pair.adapter.count, pair.source.load(pair.stored(None)), {"rows": []})


def finished(pair: Pair, target: CheckpointWriter, probe: Tensor, states: States) -> Report:
    """The report of a run whose parts are committed, each with its `rows`.

    probe: the tokens that `states` have the probe of.
    """
    report = Report(config=pair.source.config, expected=pair.source.names())
    for part in range(pair.adapter.count + 1):
        committed = target.restore(part)
        assert committed is not None
        report.rows += committed[1]["rows"]
    report.adapter = KeptFactors(target, pair.adapter.count + 1) or None
    report.carried = pair.adapter.unmapped_tensors()
    assert states.probe is not None
    logits = pair.adapter.logits(pair.source, states.probe).cpu()
    report.fingerprint = Fingerprint(probe, logits)
    report.summary = _summary(report.rows, pair)
    return report


def _summary(rows: list[dict[str, Any]], pair: Pair) -> dict[str, Any]:
    """Means over corrected linears, and sizes."""
    summary: dict[str, Any] = {"linears": len(rows)}
    for key in MEANS:
        if values := [row[key] for row in rows if key in row]:
            summary[f"mean_{key}"] = sum(values) / len(values)
    if ranks := [row["rank"] for row in rows]:
        summary |= {"least_rank": min(ranks), "most_rank": max(ranks)}
    added = sum(row["bytes"] for row in rows)
    before = pair.source.stored_bytes
    return summary | {"bytes_before": before, "bytes_added": added, "added_share": added / before}
