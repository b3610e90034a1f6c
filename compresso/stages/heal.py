"""Train a model briefly, to give back what compression took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from compresso.calibration.data import Calibration
from compresso.calibration.generated import Author
from compresso.calibration.opening import open_adapter
from compresso.checkpoint.kept import KeptState
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import WORK, CheckpointWriter
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime, log
from compresso.stages.compensate_summary import recovered, told
from compresso.stages.heal_choice import Trained, draw
from compresso.stages.heal_disk import check_disk, disk_left
from compresso.stages.heal_measure import measure
from compresso.stages.heal_output import Output, of_corrections, write_output
from compresso.stages.heal_plan import Plan, make_plan
from compresso.stages.heal_text import Text, find_original, load_text, open_objective
from compresso.stages.plots import wants_plot
from compresso.stages.training_plot import write_training
from compresso.training.loop import train
from compresso.training.model import TrainingModel
from compresso.training.options import History, TrainOptions
from compresso.training.processes import Processes, join
from compresso.training.teacher import Beside

MANY_EPOCHS = 8


def heal(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """Train what the method says, and write the model with the least held-out loss.

    What is not trained is stored as it was, bit for bit. A restarted run goes on from the last
    state that was kept.

    Reports a row per measurement of held-out text: `step`, `tokens` seen, `heldout_loss` and its
    parts, `heldout_ppl`. The summary holds the perplexity of the original, of the source and of
    what is written, and the share of the lost log-perplexity that came back.

    Peak memory: the whole model, what is trained five times in float32, and what the sequences run
    at once leave behind in all blocks.
    """
    assert calibration is not None
    drawing = wants_plot(step.settings.plot)
    report, processes = Report(), join(runtime.device)
    trusted = runtime.trust_remote_code
    original = find_original(source, step, report.warnings, trust_remote_code=trusted)
    with processes.first_alone():
        author = Author(original or source, runtime, target.target.parent)
        text = load_text(calibration, step, source, author)
    plan = make_plan(source, step, text, runtime, processes)
    # A teacher is asked about what is read, and nothing else.
    text = text.first(plan.options.steps * plan.options.sequences)
    work = _Work(source, step, text, target, runtime, report)
    if processes.first:
        work.measure_original(original)
    history, output = work.train(plan, original, processes)
    if processes.first:
        work.write(output)
        work.tell(history, drawing=drawing)
    return report


@dataclass(frozen=True)
class _Work:
    """One heal run."""

    source: Checkpoint
    step: Step
    text: Text
    target: CheckpointWriter
    runtime: Runtime
    report: Report

    def train(
        self, plan: Plan, original: Checkpoint | None, processes: Processes
    ) -> tuple[History, Output]:
        """What training came to, and what of it is to be written."""
        source, step, moved = self.source, self.step, plan.moved
        directory = self.target.partial / WORK
        disk = disk_left(source, moved, getattr(step.settings, "rank", 0), self.target)
        if processes.first:
            check_disk(disk, self.target, instead="a method that trains less, such as `lora`")
        model = TrainingModel(plan.adapter, plan.source, packed=plan.packed)
        beside = Beside(plan.memory, disk)
        teaching = open_objective(
            source, original, step, self.text, directory, self.runtime, beside=beside
        )
        with teaching as objective, model:
            if objective.teacher is not None:
                self.report.summary["teacher"] = objective.teacher.place
            history = train(
                model,
                self._parameters(model, moved),
                objective,
                self.text.data,
                self.text.heldout,
                plan.options,
                store=KeptState(directory, writes=processes.first),
                choose=self._draws(moved),
                processes=processes,
                title="heal",
            )
            self._sum_up(moved, model, history, plan.options)
            if not moved.linears:
                return history, Output(model.trained_tensors(first=processes.first))
            merge = not source.packed and step.settings.merge is not False
            return history, of_corrections(model, source, merge=merge)

    def measure_original(self, original: Checkpoint | None) -> None:
        """Say what the held-out text is to the original, if there is one."""
        if original is not None:
            found, _ = self._measure(original, "original")
            self.report.summary["ppl_original"] = found
            log(f"heal: held-out perplexity of the original: {found:.4g}")

    def write(self, output: Output) -> None:
        """Commit all parts; measure what they make up."""
        report, source = self.report, self.source
        healed = output.changed(source)
        report.summary["ppl_healed"], report.fingerprint = self._measure(healed, "result")
        adapter = open_adapter(source, self.runtime)
        report.summary["unchanged_tensors"] = write_output(adapter, source, output, self.target)
        report.adapter = output.factors
        report.config = source.config
        report.expected = source.names()
        report.carried = adapter.unmapped_tensors()

    def tell(self, history: History, *, drawing: bool) -> None:
        """Say how it went, once the result is measured."""
        report = self.report
        perplexities = _perplexities(report.summary, history)
        report.summary = perplexities | report.summary | {"heldout": self.text.record}
        report.rows = [row for row in history.rows if "heldout_loss" in row]
        report.files |= write_training(
            history,
            self.target.partial,
            original=perplexities.get("ppl_original"),
            title=f"{self.step.name} of {self.source.path.name}",
            draws=drawing,
        )

    def _measure(self, checkpoint: Checkpoint, what: str) -> tuple[float, Fingerprint]:
        return measure(
            checkpoint,
            self.text.batches,
            self.runtime,
            spill_dir=self.target.partial,
            title=f"heal: {what}",
        )

    def _parameters(self, model: TrainingModel, moved: Trained) -> list[nn.Parameter]:
        settings: Any = self.step.settings
        if not moved.linears:
            return model.train_tensors(moved.tensors)
        start = self.source.adapter
        return model.add_low_rank(
            moved.linears,
            settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            seed=settings.seed,
            start=None if start is None else start.load(moved.linears),
        )

    def _draws(self, moved: Trained) -> Any:
        if not moved.drawn:
            return None
        settings: Any = self.step.settings

        def choose(step: int) -> list[int]:
            return draw(
                moved,
                active=settings.active,
                interval=settings.interval,
                seed=settings.seed,
                step=step,
            )

        return choose

    def _sum_up(
        self, moved: Trained, model: TrainingModel, history: History, options: TrainOptions
    ) -> None:
        """What training came to, for the report."""
        report = self.report
        report.earlier = history.earlier
        found = told(history, model, options, len(self.text.data))
        report.summary |= found
        report.summary |= {
            "blocks_run_again": options.checkpointing,
            "compiled": options.compile,
        }
        if moved.drawn:
            report.summary["optimizer_memory"] = "begins anew for blocks that are drawn"
        if history.ended == "diverged":
            report.warnings.append(
                f"the loss was not finite at step {found['steps']}: this is the state after step"
                f" {history.best_step}"
            )
        if found["epochs"] > MANY_EPOCHS:
            report.warnings.append(
                f"the text was read {found['epochs']:.0f} times: more of it (`--nsamples`), or a"
                " longer one, heals better"
            )
        if not history.best_step:
            report.warnings.append("training never lowered the held-out loss: nothing has changed")


def _perplexities(summary: dict[str, Any], history: History) -> dict[str, float]:
    """Those of the held-out text, and the share of what was lost that came back."""
    before, healed = history.heldout(0)["heldout_ppl"], summary["ppl_healed"]
    if (original := summary.get("ppl_original")) is None:
        return {"ppl_unhealed": before, "ppl_healed": healed}
    names = {"ppl_before": "ppl_unhealed", "ppl_after": "ppl_healed"}
    found = recovered(original, before, healed)
    return {names.get(name, name): value for name, value in found.items()}
