"""Drop whole blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from compresso import registry
from compresso.calibration.data import Calibration
from compresso.calibration.probe import probe_tokens
from compresso.calibration.statistics import BlockScores, measure_blocks
from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError
from compresso.kernels.selection import blocks_for_ratio, tail
from compresso.models.adapter import ModelAdapter
from compresso.models.depth import drop_blocks, rename_blocks
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime, track

Choose = Callable[[int], list[int]]


@torch.no_grad()
def prune(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """Drop the blocks that the method chooses, and renumber the others.

    Every kept tensor is stored as it was, bit for bit. A kept block is committed as soon as it is
    written; a restarted run finds the choice in the first committed part and measures nothing
    again.

    Reports a row per block: its parameters, its score if the method has one (`influence`, or the
    `angle` of the run that starts there), whether it is `dropped`, else what it is `kept_as`.

    Peak memory: one block's weights; while scores are measured, see `measure_blocks`.
    """
    if source.packed:
        raise ConfigError(
            f"the weights of `{source.path}` are quantized", hint="prune first, then quantize"
        )
    adapter = ModelAdapter.open(
        source,
        dtype=runtime.compute_dtype(source.dtype),
        device=runtime.device,
        trust_remote_code=runtime.trust_remote_code,
    )
    if (first := target.restore(0)) is not None:
        decision = Decision(**first[1]["decision"])
    else:
        decision = _decide(step, adapter, source, calibration, target.partial, runtime)
    keep = [block for block in range(adapter.count) if block not in decision.drop]
    config = drop_blocks(source.config, adapter.family, keep)
    names = rename_blocks(
        source.names(), prefix=adapter.blocks_prefix, count=adapter.count, keep=keep
    )
    fingerprint = _write(adapter, source, target, keep, names, decision)
    report = Report(config=config, fingerprint=fingerprint, expected=sorted(names.values()))
    report.rows = _rows(decision)
    report.summary = _summary(source, step, decision, names)
    if unmapped := [name for name in adapter.unmapped_tensors() if name in names]:
        report.carried = [names[name] for name in unmapped]
        report.warnings.append(
            f"{len(unmapped)} tensors that the model has no place for are kept, first"
            f" `{unmapped[0]}`"
        )
    return report


@dataclass(frozen=True)
class Decision:
    """What is dropped and why, in the plain values that a part's report can hold.

    parameters: of every block. drop: ascending.
    score:      name of what the choice went by, empty if nothing was measured.
    values:     the score of every block. An angle is that of the run of as many blocks as are
                dropped that starts there, so the last blocks have none.
    """

    parameters: list[int]
    drop: list[int]
    score: str = ""
    values: list[float] = field(default_factory=list)


def block_parameters(adapter: ModelAdapter, source: Checkpoint) -> list[int]:
    """The number of weights in every block."""
    sizes = []
    for index in range(adapter.count):
        prefix = adapter.block_prefix(index)
        names = [name for name in source.weight_names() if name.startswith(prefix)]
        infos = [source.weight_info(name) for name in names]
        sizes.append(sum(prod(info.shape) for info in infos if info.dtype.is_floating_point))
    return sizes


def chooser(method: str, blocks: int, scores: BlockScores | None) -> Choose:
    """The choice of so many blocks by a method other than `manual`.

    blocks: in the model. scores: None for a method that goes by none.
    """
    choose = registry.load(registry.method("prune", method).code)
    if method == "tail" or scores is None:
        return partial(choose, blocks)
    return partial(choose, scores.influence if method == "shortgpt" else scores.triangle)


def _decide(
    step: Step,
    adapter: ModelAdapter,
    source: Checkpoint,
    calibration: Calibration | None,
    spill_dir: Path,
    runtime: Runtime,
) -> Decision:
    parameters = block_parameters(adapter, source)
    if step.method == "manual":
        named = registry.load(registry.method("prune", "manual").code)
        return Decision(parameters, named(adapter.count, step.settings.drop))
    amount = partial(_amount, step=step, parameters=parameters, total=source.parameters)
    if len(set(parameters)) == 1:
        # Of equal blocks any choice removes as much: a wrong amount is refused before the walk.
        amount(partial(tail, adapter.count))
    if calibration is None:
        return Decision(parameters, amount(chooser(step.method, adapter.count, None)))
    # So is a config.json that no choice of blocks could be written to.
    drop_blocks(source.config, adapter.family, list(range(adapter.count)))
    scores = measure_blocks(
        adapter,
        source,
        calibration.batches,
        angles=step.settings.tokens if step.method == "contiguous" else None,
        runtime=runtime,
        spill_dir=spill_dir,
    )
    drop = sorted(amount(chooser(step.method, adapter.count, scores)))
    if scores.triangle is None:
        return Decision(parameters, drop, "influence", scores.influence)
    return Decision(parameters, drop, "angle", scores.triangle[len(drop) - 1])


def _amount(choose: Choose, *, step: Step, parameters: list[int], total: int) -> list[int]:
    """The choice of as many blocks as the settings ask for."""
    if step.settings.blocks is not None:
        return choose(step.settings.blocks)
    return blocks_for_ratio(choose, parameters, total=total, ratio=step.settings.ratio)


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
    probe = probe_tokens(adapter.config.vocab_size)
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


def _rows(decision: Decision) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    place = 0
    for block, count in enumerate(decision.parameters):
        row: dict[str, Any] = {"block": block, "parameters": count}
        if block < len(decision.values):
            row[decision.score] = decision.values[block]
        row["dropped"] = block in decision.drop
        if not row["dropped"]:
            row["kept_as"] = place
            place += 1
        rows.append(row)
    return rows


def _summary(
    source: Checkpoint, step: Step, decision: Decision, names: dict[str, str]
) -> dict[str, Any]:
    removed = sum(decision.parameters[block] for block in decision.drop)
    summary: dict[str, Any] = {
        "removed_blocks": decision.drop,
        "removed_parameters": removed,
        "removed_share": removed / source.parameters,
    }
    if (asked := getattr(step.settings, "ratio", None)) is not None:
        summary["asked_share"] = asked
    return summary | {
        "parameters_before": source.parameters,
        "parameters_after": source.parameters - removed,
        "bytes_before": source.stored_bytes,
        "bytes_after": sum(source.info(name).nbytes for name in names),
    }
