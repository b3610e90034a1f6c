"""Correct the linears of a compressed model by matrices of low rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compresso import registry
from compresso.calibration.data import Calibration, first_tokens
from compresso.calibration.following import Following
from compresso.calibration.probe import probe_of
from compresso.calibration.states import States
from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import CheckpointWriter
from compresso.kernels.decomposition import Fisher
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime, track
from compresso.stages.compensate_plan import Plan, make_plan
from compresso.stages.compensate_result import commit_outside, finished
from compresso.stages.compensate_work import Work
from compresso.stages.kept_fisher import fisher_of_run
from compresso.stages.original import original_of
from compresso.stages.rank_choice import choose_ranks
from compresso.stages.requantize import requantize

FISHER_TOKENS = 4096  # that gradients are measured on, to choose ranks

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
    run = _Run(plan, settings, calibration, target, runtime)
    ranks = run.ranks()
    states, following = run.enter(run.work)
    run.write(states, following, ranks)
    return finished(plan.pair, target, run.probe, states)


class _Run:
    """One run of `eora`."""

    def __init__(
        self,
        plan: Plan,
        settings: Any,
        calibration: Calibration | None,
        target: CheckpointWriter,
        runtime: Runtime,
    ) -> None:
        self.plan = plan
        self.pair = plan.pair
        self.work = Work(plan.pair, weighted=settings.weighted, match=settings.matched)
        self.batches = [] if calibration is None else calibration.batches
        self.target = target
        self.runtime = runtime
        self.probe = probe_of(self.pair.adapter.config)

    def enter(self, work: Work) -> tuple[States, Following | None]:
        """What enters the first block, and the original beside it if it is needed."""
        follows, pair = work.match > 0, self.pair
        budget = self.runtime.max_memory // (1 + follows)
        spill_dir = self.target.partial
        states = enter_blocks(
            pair.adapter,
            pair.source,
            self.batches,
            probe=self.probe,
            budget=budget,
            spill_dir=spill_dir,
        )
        if not follows:
            return states, None
        theirs = enter_blocks(
            pair.theirs,
            pair.original,
            self.batches,
            probe=None,
            budget=budget,
            spill_dir=spill_dir,
        )
        structure = pair.adapter.structure
        return states, Following(pair.theirs, pair.original, theirs, pair.blocks, structure)

    def ranks(self) -> dict[str, int]:
        """Of every linear that may be corrected. A restarted run has those of the first."""
        if self.plan.ranks is not None:
            return self.plan.ranks
        state = self.target.recall()
        if state is None:
            fisher = self._fisher()
            # Where no weight was changed, all that is lacking was lost before.
            own = replace(self.work, match=0.0) if self.plan.changed else self.work
            state = {"ranks": choose_ranks(own, self.plan, *self.enter(own), fisher)}
            self.target.remember(state)
        ranks: dict[str, int] = state["ranks"]
        return ranks

    def _fisher(self) -> dict[str, Fisher]:
        """How much the loss depends on the original's linears; empty without text."""
        if not self.work.weighted:
            return {}
        return fisher_of_run(
            self.pair.theirs,
            self.pair.original,
            first_tokens(self.batches, FISHER_TOKENS),
            target=self.target,
            runtime=self.runtime,
        )

    def write(self, states: States, following: Following | None, ranks: Mapping[str, int]) -> None:
        """Commit the blocks that are not committed yet, and last what is in none."""
        pair, target, forms = self.pair, self.target, self.plan.forms

        def restore(index: int) -> dict[str, Tensor] | None:
            if (part := target.restore(index)) is None:
                return None
            return forms[index].restored(part[0], target.restore_beside(index) or {})

        blocks = walk_blocks(pair.adapter, pair.source, states, restore=restore)
        for block in track(blocks, pair.adapter.count, "compensate eora"):
            if following is not None:
                following.follow(block.index, keep=not block.restored)
            if not block.restored:
                done = self.work.correct(block, following, forms[block.index], ranks)
                report = {"rows": done.rows}
                target.commit(block.index, done.tensors, report, beside=done.beside)
                del done
        commit_outside(pair, target)
