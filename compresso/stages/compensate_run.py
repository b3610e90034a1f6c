"""What one run of `eora` walks with: the model, its original beside it, and the ranks to find."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from compresso.calibration.data import first_tokens
from compresso.calibration.following import Following
from compresso.calibration.probe import probe_of
from compresso.calibration.states import States
from compresso.calibration.walk import enter_blocks
from compresso.checkpoint.writer import CheckpointWriter
from compresso.kernels.decomposition import Fisher
from compresso.runtime import Runtime
from compresso.stages.compensate_plan import Plan
from compresso.stages.compensate_work import Work
from compresso.stages.kept_fisher import fisher_of_run
from compresso.stages.rank_choice import choose_ranks

FISHER_TOKENS = 4096  # that gradients are measured on, to choose ranks


class EoraRun:
    """One run of `eora`, as a method or to begin training with."""

    def __init__(
        self,
        plan: Plan,
        work: Work,
        batches: list[Tensor],
        target: CheckpointWriter,
        runtime: Runtime,
    ) -> None:
        """batches: token ids, (B, T) int64 each. target: what is written, which keeps the ranks."""
        self.plan = plan
        self.work = work
        self.probe = probe_of(plan.pair.adapter.config)
        self._batches = batches
        self._target = target
        self._runtime = runtime

    def enter(self, work: Work) -> tuple[States, Following | None]:
        """What enters the first block, and the original beside it if it is needed."""
        follows, pair = work.match > 0, self.plan.pair
        budget = self._runtime.max_memory // (1 + follows)
        spill_dir = self._target.partial
        states = enter_blocks(
            pair.adapter,
            pair.source,
            self._batches,
            probe=self.probe,
            budget=budget,
            spill_dir=spill_dir,
        )
        if not follows:
            return states, None
        theirs = enter_blocks(
            pair.theirs,
            pair.original,
            self._batches,
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
        state = self._target.recall()
        if state is None:
            fisher = self._fisher()
            # Where no weight was changed, all that is lacking was lost before.
            own = replace(self.work, match=0.0) if self.plan.changed else self.work
            state = {"ranks": choose_ranks(own, self.plan, *self.enter(own), fisher)}
            self._target.remember(state)
        ranks: dict[str, int] = state["ranks"]
        return ranks

    def _fisher(self) -> dict[str, Fisher]:
        """How much the loss depends on the original's linears; empty without text."""
        if not self.work.weighted:
            return {}
        return fisher_of_run(
            self.plan.pair.theirs,
            self.plan.pair.original,
            first_tokens(self._batches, FISHER_TOKENS),
            target=self._target,
            runtime=self._runtime,
        )
