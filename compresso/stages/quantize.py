"""Quantize the linears of every block."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Any

import torch
from torch import Tensor

from compresso import registry
from compresso.calibration.data import Calibration
from compresso.calibration.opening import open_adapter
from compresso.calibration.originals import Originals
from compresso.calibration.probe import probe_of
from compresso.calibration.states import States
from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.merged import merged
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.kernels.decomposition import Fisher
from compresso.models.adapter import ModelAdapter
from compresso.models.rotation import RotatedCheckpoint, rotated
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime, track
from compresso.stages.bit_choice import BitChoice, choose_bits
from compresso.stages.bit_job import BitJob
from compresso.stages.compensate_forms import KeptFactors
from compresso.stages.error_choice import choose_by_error
from compresso.stages.kept_fisher import fisher_of_run
from compresso.stages.ladder import make_ladder
from compresso.stages.quantize_layouts import make_layout
from compresso.stages.quantize_plan import Plan, make_plan
from compresso.stages.quantize_work import Work


@torch.no_grad()
def quantize(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """Replace each block's linear weights by codes. The corrections of an adapter are added before.

    Blocks are quantized in order, and within a block the input groups, each calibrated on the
    outputs of what was quantized before it. With a target, how many bits each group gets is chosen
    first. A block is committed as soon as it is done; a restarted run takes the committed blocks
    from `target` and continues after them.

    Reports a row per linear: bits, squared error relative to the weight's, and for calibrated
    methods the relative output error on the calibration tokens and the damping used; where weights
    were moved before, by how much of their squares, and errors from there.

    Peak memory: one block's weights, one gram and its factor, and the hidden states of the
    calibration tokens, in the original model too if need be, up to the memory budget.
    """
    settings, source = step.settings, merged(source)
    if settings.rotate:
        source = rotated(source, seed=settings.seed)
    adapter = open_adapter(source, runtime)
    packed_as = registry.packed_as(step.method, settings)
    plan = make_plan(adapter, settings, packed_as=packed_as)
    fisher = None
    if getattr(settings, "fisher", False) and calibration is not None:
        fisher = fisher_of_run(adapter, source, calibration.batches, target=target, runtime=runtime)
    choice = None
    if getattr(settings, "hits_target", False):
        ladder = make_ladder(step.method, settings, source.dtype)
        job = BitJob(settings, adapter, source, calibration, plan.groups, ladder, target, runtime)
        choice = _choose(replace(job, elsewhere=_elsewhere(job, plan)), fisher)
        plan = replace(plan, bits=choice.bits)
    layout = make_layout(adapter, source, step, plan)
    work = Work(adapter, source, step, plan, layout, fisher)
    probe = probe_of(adapter.config)
    batches = [] if calibration is None or work.decomposes else calibration.batches
    states, original = _enter(work, batches, probe, target, runtime)
    _quantize_blocks(work, step, target, states, original)
    report = _report(work, target)
    assert states.probe is not None
    report.fingerprint = Fingerprint(probe, adapter.logits(source, states.probe).cpu())
    report.summary = _summary(source, report.rows, plan, choice)
    return report


def _enter(
    work: Work, batches: list[Tensor], probe: Tensor, target: CheckpointWriter, runtime: Runtime
) -> tuple[States, Originals | None]:
    """What enters the first block, and the original model to be run beside, if there is any."""
    followed = batches[: ceil(work.followed * len(batches))]

    def enter(batches: list[Tensor], tokens: Tensor | None) -> States:
        return enter_blocks(
            work.adapter,
            work.source,
            batches,
            probe=tokens,
            budget=runtime.max_memory // (1 + bool(followed)),
            spill_dir=target.partial,
        )

    states = enter(batches, probe)
    return states, Originals(work.adapter, enter(followed, None)) if followed else None


def _report(work: Work, target: CheckpointWriter) -> Report:
    """What was stored, once all is committed."""
    numbers = range(work.adapter.count + 1)
    parts = [_committed(target, part) for part in numbers]
    described = [one for part in parts for one in part["described"]]
    report = Report(rows=[row for part in parts for row in part["rows"]])
    report.config = work.layout.config(work.source.config, described)
    report.expected = _expected(work.adapter, work.source, work.plan, work.layout.names)
    report.carried = work.adapter.unmapped_tensors()
    report.adapter = KeptFactors(target, len(numbers)) or None
    return report


def _choose(job: BitJob, fisher: dict[str, Fisher] | None) -> BitChoice:
    """The bits that hit the target, as the method chooses them."""
    if hasattr(job.settings, "allocation"):
        return choose_bits(job)
    return choose_by_error(job, fisher or {})


def _elsewhere(job: BitJob, plan: Plan) -> int | None:
    """Bytes that will be stored for all that is in no group, if that is not as in the source."""
    if not plan.head or plan.head_bits is None:
        return None
    info = job.source.weight_info(job.adapter.head_tensor)
    return (
        job.other_bytes
        - info.nbytes
        + job.ladder.nbytes((info.shape[0], info.shape[1]), plan.head_bits)
    )


def _quantize_blocks(
    work: Work, step: Step, target: CheckpointWriter, states: States, originals: Originals | None
) -> None:
    """Commit the blocks that are not committed yet, and last what is in none.

    originals: the original model, for methods that go by it.
    """

    def restore(index: int) -> dict[str, Tensor] | None:
        return work.restored(target, index)

    count = work.adapter.count
    blocks = walk_blocks(work.adapter, work.source, states, restore=restore)
    for block in track(blocks, count, f"quantize {step.method}"):
        if originals is not None:
            changed = restore(block.index) or {}
            if (owner := work.adapter.structure.owner(block.index)) != block.index:
                changed = {**(restore(owner) or {}), **changed}
            work.follow(block, originals, changed)
        if not block.restored:
            done = work.quantize_block(block, states, originals)
            report = {"rows": done.rows, "described": done.described}
            target.commit(block.index, done.tensors, report, beside=done.beside)
            del done  # some of its tensors keep a map of the source's shard
    outside = work.quantize_outside(states)
    report = {"rows": outside.rows, "described": outside.described}
    target.commit(count, outside.tensors, report, beside=outside.beside)


def _expected(adapter: ModelAdapter, source: Checkpoint, plan: Plan, names_of: Any) -> list[str]:
    """Names of all tensors the output holds: the source's, the quantized ones packed."""
    quantized = {
        f"{adapter.block_prefix(index)}{path}"
        for index, groups in enumerate(plan.groups)
        for paths in groups
        for path in paths
    }
    if plan.head:
        quantized.add(adapter.head_tensor.removesuffix(".weight"))
    names: list[str] = []
    for name in source.names():
        path = name.removesuffix(".weight")
        names += names_of(path) if path != name and path in quantized else [name]
    return names


def _committed(target: CheckpointWriter, part: int) -> dict[str, Any]:
    """The report of a committed part."""
    committed = target.restore(part)
    assert committed is not None
    return committed[1]


def _summary(
    source: Checkpoint, rows: list[dict[str, Any]], plan: Plan, choice: BitChoice | None
) -> dict[str, Any]:
    """Means over linears, what was left alone, and how bits were chosen."""
    summary: dict[str, Any] = {"linears": len(rows), "kept_dense": plan.kept}
    parameters = sum(row["parameters"] for row in rows)
    if parameters:
        bits = sum(row["stored_bits"] * row["parameters"] for row in rows)
        summary["stored_bits"] = bits / parameters
    for key in ("weight_error", "output_error"):
        if values := [row[key] for row in rows if key in row]:
            summary[f"mean_{key}"] = sum(values) / len(values)
    summary["most_damping"] = max((row.get("damping", 0.0) for row in rows), default=0.0)
    if isinstance(source, RotatedCheckpoint):
        summary["bytes_added_by_rotation"] = source.added_bytes
    if choice is not None:
        summary["choice"] = choice.summary | {"groups": choice.rows}
    return summary
