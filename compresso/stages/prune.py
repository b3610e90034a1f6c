"""Drop blocks, or halves of blocks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from compresso.calibration.data import Calibration
from compresso.calibration.opening import open_adapter
from compresso.calibration.probe import probe_of
from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError
from compresso.models.adapter import ModelAdapter
from compresso.models.depth import drop_blocks, rename_blocks
from compresso.models.structure import (
    Structure,
    removed_tensors,
    restructure,
    structure_of,
)
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime, track
from compresso.stages.prune_choice import Choice, choose
from compresso.stages.prune_units import HALVES, Decision, cost_of, name_of


@torch.no_grad()
def prune(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """Drop the blocks, or halves of blocks, that the method chooses, and renumber the blocks.

    Every kept tensor is stored as it was, bit for bit. A kept block is committed as soon as it is
    written; a restarted run finds the choice in the first committed part and measures nothing
    again. A search is remembered step by step. If only whole blocks go, the result is a plain
    checkpoint of the same kind; otherwise it carries the code that loads it.

    Reports a row per block, or per half of a block where halves can go: its parameters, its score
    if the method has one, whether it is `dropped`, and the block it is `kept_as`.

    Peak memory: one block's weights; while scores are measured, see the method.
    """
    if source.packed:
        raise ConfigError(
            f"the weights of `{source.path}` are quantized", hint="prune first, then quantize"
        )
    if structure_of(source.config).shared:
        raise ConfigError(
            f"the blocks of `{source.path}` share weights", hint="prune first, then fold"
        )
    adapter = open_adapter(source, runtime)
    if (first := target.restore(0)) is not None:
        decision = Decision(**first[1]["decision"])
    else:
        decision = choose(Choice(step, adapter, source, calibration, target, runtime))
    removed, costs = set(decision.removed), decision.costs
    keep = [
        block
        for block in range(adapter.count)
        if any(costs[half] and half not in removed for half in (2 * block, 2 * block + 1))
    ]
    _check_rest(adapter, decision, keep)
    names = _kept_names(adapter, source, keep, removed)
    fingerprint = _write(adapter, source, target, keep, names, decision)
    report = Report(fingerprint=fingerprint, expected=sorted(names.values()))
    report.config = _config(adapter, source, keep, removed)
    split = any(half // 2 in keep for half in decision.removed)
    report.rows = _rows(
        decision, keep, halves=split or getattr(step.settings, "unit", "block") != "block"
    )
    report.summary = _summary(source, step, decision, names, keep)
    if unmapped := [name for name in adapter.unmapped_tensors() if name in names]:
        report.carried = [names[name] for name in unmapped]
        report.warnings.append(
            f"{len(unmapped)} tensors that the model has no place for are kept, first"
            f" `{unmapped[0]}`"
        )
    return report


def _check_rest(adapter: ModelAdapter, decision: Decision, keep: list[int]) -> None:
    """Raises ConfigError if what is left could not run."""
    left = [
        half for half, cost in enumerate(decision.costs) if cost and half not in decision.removed
    ]
    if not keep:
        raise ConfigError(
            f"cannot remove all {adapter.count} blocks", hint="at least one must stay"
        )
    if not any(half % 2 == 0 for half in left):
        raise ConfigError("cannot remove every attention", hint="at least one must stay")


def _kept_names(
    adapter: ModelAdapter, source: Checkpoint, keep: list[int], removed: set[int]
) -> dict[str, str]:
    """Stored name -> new name, of all tensors that stay."""
    names = rename_blocks(
        source.names(), prefix=adapter.blocks_prefix, count=adapter.count, keep=keep
    )
    lost = [half for half in removed if half // 2 in keep]
    gone = removed_tensors(
        names, adapter.family, Structure().without(lost), prefix=adapter.blocks_prefix
    )
    return {name: new for name, new in names.items() if name not in gone}


def _config(
    adapter: ModelAdapter, source: Checkpoint, keep: list[int], removed: set[int]
) -> dict[str, Any]:
    """The config.json of what is left."""
    config = drop_blocks(source.config, adapter.family, keep)
    gone = [
        2 * place + half
        for place, block in enumerate(keep)
        for half in (0, 1)
        if 2 * block + half in removed
    ]
    return restructure(config, structure_of(config).without(gone))


def _write(
    adapter: ModelAdapter,
    source: Checkpoint,
    target: CheckpointWriter,
    keep: list[int],
    names: dict[str, str],
    decision: Decision,
) -> Fingerprint:
    """Commit what is not committed yet; run the pruned model on the probe.

    names: stored name -> new name, of all tensors that stay.
    """
    if halves := [half for half in decision.removed if half // 2 in keep]:
        adapter.remove(halves)
    probe = probe_of(adapter.config)
    states = enter_blocks(adapter, source, [], probe=probe, budget=0, spill_dir=None)
    parts = _parts(names, adapter.blocks_prefix, len(keep))
    target.resize(len(parts))
    walk = track(walk_blocks(adapter, source, states, keep=keep), len(keep), "prune")
    for place, part in enumerate(parts):
        next(walk, None)  # runs the block before
        if target.restore(place) is None:
            tensors = {part[name]: tensor for name, tensor in source.load(part).items()}
            target.commit(place, tensors, {"decision": asdict(decision)})
    assert states.probe is not None
    return Fingerprint(probe, adapter.logits(source, states.probe).cpu())


def _parts(names: dict[str, str], prefix: str, blocks: int) -> list[dict[str, str]]:
    """The tensors of every block that stays, and last those of none."""
    parts: list[dict[str, str]] = [{} for _ in range(blocks + 1)]
    for old, new in names.items():
        number = new.removeprefix(prefix).partition(".")[0]
        inside = new.startswith(prefix) and number.isdecimal() and int(number) < blocks
        parts[int(number) if inside else blocks][old] = new
    return parts


def _rows(decision: Decision, keep: list[int], *, halves: bool) -> list[dict[str, Any]]:
    """One for each block, or for each half that the model had."""
    units = [
        unit
        for block in range(len(decision.costs) // 2)
        for unit in (((2 * block,), (2 * block + 1,)) if halves else ((2 * block, 2 * block + 1),))
        if cost_of(unit, decision.costs)
    ]
    places = {block: place for place, block in enumerate(keep)}
    rows: list[dict[str, Any]] = []
    for unit in units:
        name, block = name_of(unit), unit[0] // 2
        row: dict[str, Any] = {"block": block, "parameters": cost_of(unit, decision.costs)}
        if halves:
            row["half"] = HALVES[unit[0] % 2]
        if decision.score:
            row[decision.score] = decision.values.get(name)
        if decision.order:
            row["order"] = decision.order.index(name) + 1 if name in decision.order else None
        row["dropped"] = all(half in decision.removed for half in unit if decision.costs[half])
        if not row["dropped"]:
            row["kept_as"] = places[block]
        rows.append(row)
    return rows


def _summary(
    source: Checkpoint, step: Step, decision: Decision, names: dict[str, str], keep: list[int]
) -> dict[str, Any]:
    removed = cost_of(decision.removed, decision.costs)
    blocks = [block for block in range(len(decision.costs) // 2) if block not in keep]
    halves = [name_of((half,)) for half in decision.removed if half // 2 in keep]
    summary: dict[str, Any] = {"removed_blocks": blocks}
    if halves:
        summary["removed_halves"] = halves
    summary |= {"removed_parameters": removed, "removed_share": removed / source.parameters}
    if (asked := getattr(step.settings, "ratio", None)) is not None:
        summary["asked_share"] = asked
    if decision.order:
        summary["order"] = decision.order
    if decision.history:
        summary["history"] = decision.history
    return (
        summary
        | decision.facts
        | {
            "parameters_before": source.parameters,
            "parameters_after": source.parameters - removed,
            "bytes_before": source.stored_bytes,
            "bytes_after": sum(source.info(name).nbytes for name in names),
        }
    )
