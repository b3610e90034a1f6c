"""Correct the linears of a compressed model by matrices of low rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compresso import registry
from compresso.calibration.data import Calibration
from compresso.calibration.following import Following
from compresso.calibration.states import States
from compresso.calibration.walk import walk_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime, track
from compresso.stages.compensate_plan import make_plan
from compresso.stages.compensate_result import commit_outside, finished
from compresso.stages.compensate_run import EoraRun
from compresso.stages.compensate_work import Work
from compresso.stages.original import original_of
from compresso.stages.requantize import requantize

Stage = Callable[..., Report]


def compensate(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """Correct the source's linears so that the model comes near its original, as the method says.

    The weights stay as they are, bit by bit, and corrections become an adapter beside them; or they
    are added to weights that are dense, or stored in blocks that share weights. `lq-lora` and
    `loftq` choose new codes as well.
    """
    if step.method == "eora":
        stage: Stage = eora
    elif step.method in ("lq-lora", "loftq"):
        stage = requantize
    else:
        stage = registry.load(registry.method("compensate", step.method).code)
    return stage(source, step, calibration, target, runtime)


@torch.no_grad()
def eora(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """The best correction of every linear's output on calibration text.

    Blocks are corrected in order, and within a block the input groups, each for the inputs that
    reach it in the model corrected so far. With a size, a first walk measures what every rank of
    every linear takes off the error that it makes itself, which counts as the loss depends on its
    output: see `choose_ranks`. What blocks before lost has no part in that: nothing is corrected
    yet, so it is much more than in the end. A block is committed as soon as it is done; a restarted
    run goes on after the committed ones.

    Reports a row per corrected linear: rank, bytes, and the squared error of its output, relative
    to what it should be, before and after.

    Peak memory: one block's weights and its original's, one gram and its factor, and the hidden
    states of the calibration tokens, in the original model too for `match`, up to the memory
    budget. With a size, before that, the gradients of one block.
    """
    settings = step.settings
    original = original_of(source, settings.original, trust_remote_code=runtime.trust_remote_code)
    plan = make_plan(source, original, settings, runtime)
    work = Work(plan.pair, weighted=settings.weighted, match=settings.matched)
    batches = [] if calibration is None else calibration.batches
    run = EoraRun(plan, work, batches, target, runtime)
    ranks = run.ranks()
    states, following = run.enter(work)
    _write(run, states, following, ranks, target)
    return finished(plan.pair, target, run.probe, states)


def _write(
    run: EoraRun,
    states: States,
    following: Following | None,
    ranks: Mapping[str, int],
    target: CheckpointWriter,
) -> None:
    """Commit the blocks that are not committed yet, and last what is in none."""
    pair, forms = run.plan.pair, run.plan.forms

    def restore(index: int) -> dict[str, Tensor] | None:
        if (part := target.restore(index)) is None:
            return None
        return forms[index].restored(part[0], target.restore_beside(index) or {})

    blocks = walk_blocks(pair.adapter, pair.source, states, restore=restore)
    for block in track(blocks, pair.adapter.count, "compensate eora"):
        if following is not None:
            following.follow(block.index, keep=not block.restored)
        if not block.restored:
            done = run.work.correct(block, following, forms[block.index], ranks)
            target.commit(block.index, done.tensors, {"rows": done.rows}, beside=done.beside)
            del done
    commit_outside(pair, target)
