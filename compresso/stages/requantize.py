"""Choose the codes of a packed model anew, together with corrections: LQ-LoRA and LoftQ."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from compresso.calibration.data import Calibration
from compresso.calibration.probe import probe_of
from compresso.calibration.states import enter_blocks
from compresso.calibration.walk import LiveBlock, walk_blocks
from compresso.checkpoint.packings import decoded
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.errors import ConfigError, placed
from compresso.kernels.decomposition import Fisher, decompose
from compresso.kernels.gptq import relative_error
from compresso.models.corrected import without_adapter
from compresso.models.structure import structure_of
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime, track
from compresso.stages.compensate_forms import factor_tensors, with_factors
from compresso.stages.compensate_result import commit_outside, finished
from compresso.stages.compensate_work import Done
from compresso.stages.kept_fisher import fisher_of_run
from compresso.stages.original import original_of
from compresso.stages.pair import Pair
from compresso.stages.recoding import recoder_of

FIRST: dict[str, Literal["factors", "codes"]] = {"lq-lora": "factors", "loftq": "codes"}


@torch.no_grad()
def requantize(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """Codes of the source's form and an adapter, found in turns from the original's weights.

    What found the stored codes has no part in this: those of GPTQ are replaced by rounded ones.
    A block is committed as soon as it is done; a restarted run goes on after the committed ones,
    with the gradients that the first one measured.

    Reports a row per linear: rank, turns, bytes of the correction, the squared error of the weight
    that the stored codes have and the new ones with it, and weighted by the Fisher matrix likewise.

    An adapter that the source has is replaced.

    Raises ConfigError if the source is not packed or shares weights, or a form of codes cannot be
    chosen again.
    """
    _check(source, step)
    original = original_of(
        source, step.settings.original, trust_remote_code=runtime.trust_remote_code
    )
    source = without_adapter(source)
    pair = Pair.open(source, original, runtime)
    for path in source.packing.shapes:
        recoder_of(source, path)  # refuses
    fisher: dict[str, Fisher] = {}
    if getattr(step.settings, "fisher", False) and calibration is not None:
        fisher = fisher_of_run(
            pair.theirs, original, calibration.batches, target=target, runtime=runtime
        )
    work = _Work(pair, step, fisher)
    probe = probe_of(pair.adapter.config)
    states = enter_blocks(pair.adapter, source, [], probe=probe, budget=0, spill_dir=None)

    def restore(index: int) -> dict[str, Tensor] | None:
        if (part := target.restore(index)) is None:
            return None
        dense = decoded(part[0], source.config, source.dtype)
        beside = target.restore_beside(index) or {}
        return with_factors(dense, beside, transposed=pair.adapter.family.transposed)

    blocks = walk_blocks(pair.adapter, source, states, restore=restore)
    for block in track(blocks, pair.adapter.count, f"compensate {step.method}"):
        if not block.restored:
            done = work.requantize(block)
            target.commit(block.index, done.tensors, {"rows": done.rows}, beside=done.beside)
    commit_outside(pair, target)
    return finished(pair, target, probe, states)


def _check(source: Checkpoint, step: Step) -> None:
    if not source.packed:
        raise ConfigError(
            f"`{source.path}` has no codes to choose anew",
            hint=f"`quantize --method lq-lora`, or compensate it by another method than"
            f" `{step.method}`",
        )
    structure = structure_of(source.config)
    if structure.shared or structure.rank:
        raise ConfigError(
            f"blocks of `{source.path}` share weights, which `{step.method}` cannot choose anew",
            hint="pass `--method eora`, whose corrections are each block's own",
        )


class _Work:
    """One run: what its blocks have in common."""

    def __init__(self, pair: Pair, step: Step, fisher: dict[str, Fisher]) -> None:
        self._pair = pair
        self._settings = step.settings
        self._first = FIRST[step.method]
        self._fisher = fisher

    def requantize(self, block: LiveBlock) -> Done:
        """New codes and corrections of a block's packed linears, which then runs with them."""
        pair, packing = self._pair, self._pair.source.packing
        done = Done(pair.source.load(pair.stored(block.index)), {}, [])
        for path in pair.paths(block.index):
            name = pair.name(block.index, path)
            if name not in packing.shapes:
                continue
            weight, recoder = pair.whole(block.index, path), recoder_of(pair.source, name)
            fisher = self._fisher.get(pair.origin(block.index, path))
            with placed(f"`{name}`"):
                found = decompose(
                    weight,
                    recoder.quantize,
                    rank=min(self._settings.rank, *weight.shape),
                    turns=self._settings.turns,
                    first=self._first,
                    dtype=pair.source.dtype,
                    fisher=fisher,
                )
            beside = factor_tensors({name: found.factors}, pair.source.dtype)
            done.tensors.update(recoder.pack(found.codes))
            done.beside.update(beside)
            new = found.decode()
            pair.adapter.set_weight(block.module, path, new)
            row: dict[str, Any] = {"block": block.index, "linear": name}
            row |= {"rank": len(found.factors.down), "turns": len(found.errors)}
            row["weight_error_before"] = relative_error(weight, pair.weight(block.index, path))
            row["weight_error"] = relative_error(weight, new)
            if fisher is not None:
                row["fisher_error"] = found.error
            done.rows.append(row | {"bytes": sum(one.nbytes for one in beside.values())})
        return done
