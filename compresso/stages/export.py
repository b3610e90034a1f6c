"""Write a model in a form that other programs read."""

from __future__ import annotations

from collections.abc import Callable

import torch

from compresso import registry
from compresso.calibration.data import Calibration
from compresso.calibration.replay import distance, fingerprint_of
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError
from compresso.formats.writing import Export, Written
from compresso.models.corrected import without_adapter
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime


@torch.no_grad()
def export(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """Write the source in the format that is the step's method; what is left to do is in `written`.

    Reports a row for all tensors that were stored alike: how many, weights and bytes. The
    fingerprint is what the source says of the probe tokens, with the corrections that go with it;
    or what the weights say that were rounded anew for this.

    Peak memory: the weights of one block.
    """
    if step.settings.merge_adapter and source.adapter is None:
        raise ConfigError(
            f"`{source.path}` has no adapter to merge", hint="leave out `--merge-adapter`"
        )
    report = Report()
    write: Callable[[Export], Written] = registry.load(
        registry.method(step.stage, step.method).code
    )
    written = write(Export(source, step.settings, target, runtime, report, calibration))
    report.written = written
    report.rows = written.rows
    report.config, report.expected = written.config, written.expected
    report.carried = written.carried
    report.summary = _summary(source, written) | report.summary
    kept = written.adapter or written.corrected or step.settings.merge_adapter
    dropped = source.adapter is not None and not kept
    model = without_adapter(source) if dropped else source
    report.fingerprint = fingerprint_of(model, runtime)
    if written.model is not None:
        own = fingerprint_of(written.model, runtime)
        report.summary |= distance(report.fingerprint, own)
        report.fingerprint = own
    return report


def _summary(source: Checkpoint, written: Written) -> dict[str, object]:
    """Sizes before and after, and what was rounded anew."""
    size = sum(row["bytes"] for row in written.rows)
    rounded = sum(row["weights"] for row in written.rows if row["stored"] == "rounded")
    return {"bytes_before": source.stored_bytes, "bytes": size, "weights_rounded_anew": rounded}
