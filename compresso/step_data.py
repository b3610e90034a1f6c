"""The token batches that a step reads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from compresso import registry
from compresso.calibration.data import Calibration, load_calibration, load_heldout
from compresso.calibration.generated import SELF, Author
from compresso.checkpoint.reader import Checkpoint, open_checkpoint
from compresso.provenance import lineage
from compresso.recipe import Step
from compresso.runtime import Runtime, log
from compresso.runtimes.tasks import tasks_key
from compresso.settings import CalibrationSettings


def read_by(step: Step) -> Any:
    """What decides which batches a step reads, beside the model and the calibration settings.

    Hashable, and the same for two steps only if they read the same.
    """
    if step.stage == "eval":
        return step.settings
    if not registry.reads_text(step.stage, step.method, step.settings):
        return None
    trains = step.settings if registry.stage(step.stage).trains else None  # says how much it needs
    return trains, _heldout_share(step), original_named(step)


def load_data(
    step: Step,
    source: Checkpoint,
    calibration: CalibrationSettings,
    runtime: Runtime,
    directory: Path,
) -> Calibration | None:
    """The token batches a step reads: calibration text, or for `eval` the held-out text.

    directory: where what the model wrote itself is kept, if it writes any.
    """
    trust = runtime.trust_remote_code
    reads = step.settings if step.stage == "eval" else calibration
    author = None
    if reads.dataset == SELF:
        author = Author(author_of(step, source), runtime, directory)
    if step.stage == "eval":
        held_out = CalibrationSettings(
            dataset=step.settings.dataset,
            samples=step.settings.samples,
            length=step.settings.length,
            seed=step.settings.seed,
        )
        whole = step.settings.samples is None
        data = load_heldout(held_out, source, whole=whole, trust_remote_code=trust, author=author)
        if step.settings.tasks:  # their questions are read, too
            asked = {"questions": tasks_key(step.settings.tasks)}
            data = replace(data, record=data.record | asked)
    elif registry.reads_text(step.stage, step.method, step.settings):
        data = load_calibration(
            calibration,
            source,
            keep_back=registry.stage(step.stage).trains,
            heldout_share=_heldout_share(step),
            trust_remote_code=trust,
            author=author,
            used=getattr(step.settings, "reads", None),
        )
    else:
        return None
    used = data.record
    log(
        f"{step.name}: {used['sequences_used']} sequences of {used['length']} tokens of"
        f" `{used['dataset']}`, {used['split']}"
    )
    return data


def _heldout_share(step: Step) -> float:
    """The share of its sequences that a step judges itself by."""
    share: float = getattr(step.settings, "heldout_share", 0.0)
    return share


def original_named(step: Step) -> str | None:
    """What the user named as the original for a step, if anything."""
    return getattr(step.settings, "original", None) or getattr(step.settings, "against", None)


def author_of(step: Step, source: Checkpoint) -> Checkpoint:
    """Who writes the text of `--dataset self`: the original, or `source` where that is gone."""
    if (named := original_named(step)) is not None:
        return open_checkpoint(named)
    first = lineage(source)[0]
    if first.key != source.key and first.path.is_dir():
        original = Checkpoint(first.path)
        if original.key == first.key:
            return original
    return source
