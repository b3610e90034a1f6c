"""Train corrections of low rank so that the whole model comes near its original."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, sqrt

import torch
from torch import nn

from compresso.calibration.data import Calibration
from compresso.calibration.opening import open_adapter
from compresso.checkpoint.kept import KeptState
from compresso.checkpoint.proof import Fingerprint
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import WORK, CheckpointWriter
from compresso.compensate_settings import RilqSettings
from compresso.errors import ConfigError
from compresso.models.adapter import ModelAdapter
from compresso.models.corrected import without_adapter
from compresso.recipe import Step
from compresso.report import Report
from compresso.runtime import Runtime
from compresso.stages.compensate_forms import Factors
from compresso.stages.compensate_pooled import groups_of, write_pooled
from compresso.stages.compensate_start import check_start, most_ranks, start_factors
from compresso.stages.compensate_summary import no_gain, recovered, sizes, told
from compresso.stages.heal_choice import Trained
from compresso.stages.heal_disk import check_disk, disk_left
from compresso.stages.heal_measure import measure
from compresso.stages.heal_memory import Load, decide_checkpointing, needed
from compresso.stages.heal_output import Output, of_corrections, write_output
from compresso.stages.original import original_of
from compresso.stages.plots import wants_plot
from compresso.stages.training_plot import write_training
from compresso.stages.training_text import Text, split_text
from compresso.stages.whole_model import own_linears, training_dtype
from compresso.training.loop import train
from compresso.training.model import TrainingModel
from compresso.training.objectives import MixedObjective, Shares
from compresso.training.options import History, TrainOptions
from compresso.training.teacher import Beside, Wanted, open_teacher

# The more ranks add to an output, the further one step moves it. Source: arXiv:2312.03732 (rsLoRA).
RATE, RATE_RANK = 1e-3, 16

# Linears that get the same kind of correction: its rank, and the inputs that it adds up first.
_Kind = tuple[list[str], int, int | None]


def rilq(
    source: Checkpoint,
    step: Step,
    calibration: Calibration | None,
    target: CheckpointWriter,
    runtime: Runtime,
) -> Report:
    """Train a correction of every linear on what the whole model says beside its original.

    What is made small is the squared difference of the states that the head reads and the
    divergence of the scores (`rilq`), or that divergence alone (`lrec`). A share of the sequences
    is held out: the corrections with the least held-out loss are what is written. They begin as the
    settings say (see `start_of`), and with a size their ranks are those of `eora`. A restarted run
    goes on from the last state that was kept.

    Reports a row per measurement of held-out text: `step`, `tokens` seen, `heldout_loss` and its
    parts, `heldout_ppl`. The summary holds the ranks and the rate, the perplexity of the original,
    of the source and of what is written on the held-out sequences, and the share of the lost
    log-perplexity that came back. Training ended by these sequences, so other text may gain a
    little less.

    Peak memory: the whole model, the corrections five times in float32, and what the sequences run
    at once leave behind in all blocks; the original one block at a time, unless it is resident. At
    the end, where corrections are merged, the linears once more in the type they are stored in.

    Source: Lee et al., arXiv:2412.01129 (RILQ), who take the error of the next token in place of
    the divergence: of little text that is learnt by heart, and the states go astray. Chai et al.,
    arXiv:2306.08162 (INT2.1), of whose loss no more is told.
    """
    assert calibration is not None
    text = split_text(calibration, step.settings)
    return _Work(source, without_adapter(source), step, text, target, runtime).run()


@dataclass(frozen=True)
class _Work:
    """One run. source: with its adapter, if it has one; bare: without."""

    source: Checkpoint
    bare: Checkpoint
    step: Step
    text: Text
    target: CheckpointWriter
    runtime: Runtime

    def run(self) -> Report:
        """See `rilq`."""
        source, settings, report = self.source, self.step.settings, Report()
        _check(source, settings)
        original = original_of(
            source, settings.original, trust_remote_code=self.runtime.trust_remote_code
        )
        history, output = self._train(original, report)
        healed = self._write(output, report)
        perplexity, report.fingerprint = self._measure(healed, "result")
        first, _ = self._measure(original, "original")
        before, _ = self._measure(source, "source")  # training may have begun with corrections
        report.summary |= recovered(first, before, perplexity)
        report.warnings += no_gain(history, before, perplexity)
        self._show(history, report, original=first)
        return report

    def _write(self, output: Output, report: Report) -> Checkpoint:
        """Commit all parts, as the settings ask; what a reader of the output will find."""
        source, settings = self.bare, self.step.settings
        adapter = open_adapter(source, self.runtime)
        report.carried = adapter.unmapped_tensors()
        if settings.pooled:
            assert output.factors is not None
            pooled = write_pooled(adapter, source, output.factors, self.target)
            report.config, report.expected = pooled.config, pooled.names
            report.summary |= pooled.sizes(source)
            report.warnings += pooled.warnings(source)
            return pooled.changed(source)
        write_output(adapter, source, output, self.target)
        report.adapter = output.factors
        report.config, report.expected = source.config, source.names()
        report.summary |= sizes(self.source, output)
        return output.changed(source)

    def _train(self, original: Checkpoint, report: Report) -> tuple[History, Output]:
        """What training came to, and what of it is to be written."""
        source, settings, text = self.bare, self.step.settings, self.text
        adapter = open_adapter(source, self.runtime, dtype=training_dtype(source, self.runtime))
        paths = self._paths(adapter)
        rank = most_ranks(self.source, settings, paths)
        shares = self._shares()
        wanted = Wanted(hidden=bool(shares.hidden), scores=bool(shares.divergence))
        load, again, beside = self._plan(adapter, paths, rank)
        check_disk(beside.disk, self.target, instead="a smaller `--rank` or `--size`")
        teacher = open_teacher(
            original,
            torch.cat((text.data, text.heldout)),
            wanted,
            place=settings.teacher,
            directory=self.target.partial / WORK,
            runtime=self.runtime,
            beside=beside,
        )
        report.summary["teacher"] = teacher.place
        # Two models are open block by block: before one is whole.
        batches = list(text.data.split(text.micro))
        start = start_factors(self.source, original, settings, batches, self.target, self.runtime)
        if settings.size is not None and start is not None:
            paths = [path for path in paths if path in start]  # of rank 0 are the others
        with teacher, TrainingModel(adapter, source) as model:
            parameters = self._corrections(model, paths, rank, start)
            del start
            options = self._options(load, again, parameters)
            history = train(
                model,
                parameters,
                MixedObjective(shares, teacher),
                text.data,
                text.heldout,
                options,
                store=KeptState(self.target.partial / WORK),
                title=self.step.method,
            )
            report.earlier = history.earlier
            report.summary |= told(history, model, options, len(text.data))
            if settings.pooled:
                return history, Output(factors=model.low_ranks())
            merge = not source.packed and settings.merge is not False
            return history, of_corrections(model, source, merge=merge)

    def _shares(self) -> Shares:
        """What the parts of the loss count."""
        settings = self.step.settings
        return Shares(
            next_token=settings.next_token,
            divergence=settings.divergence,
            hidden=settings.hidden,
        )

    def _corrections(
        self, model: TrainingModel, paths: list[str], rank: int, start: Factors | None
    ) -> list[nn.Parameter]:
        seed: int = self.step.settings.seed
        parameters: list[nn.Parameter] = []
        for kind, own, pooled in self._kinds(paths, rank):
            parameters += model.add_low_rank(kind, own, seed=seed, start=start, pooled=pooled)
        return parameters

    def _paths(self, adapter: ModelAdapter) -> list[str]:
        """The linears to correct: all, or those that the source's adapter corrects."""
        held = self.source.adapter
        return own_linears(adapter) if held is None else held.paths

    def _kinds(self, paths: list[str], rank: int) -> Iterator[_Kind]:
        """The linears by kind of correction."""
        if not self.step.settings.pooled:
            yield paths, rank, None
            return
        groups = groups_of(self.bare, paths)
        for kind in dict.fromkeys(groups.values()):
            # A rank above the number of sums adds nothing.
            yield [p for p in paths if groups[p] == kind], min(rank, kind.count), kind.size

    def _plan(
        self, adapter: ModelAdapter, paths: list[str], rank: int
    ) -> tuple[Load, bool, Beside]:
        """What is run at once, whether blocks are run again on the way back, and what it takes."""
        load = Load(
            sequences=min(self.text.micro, self.step.settings.sequences),
            length=self.text.data.shape[1],
            rank=rank,
            packed=False,
        )
        moved = Trained(linears=paths)
        asked = self.step.settings.checkpointing
        again = decide_checkpointing(adapter, self.bare, moved, load, asked)
        memory = needed(adapter, self.bare, moved, load, again=again)
        disk = disk_left(self.bare, moved, rank, self.target)
        return load, again, Beside(memory, disk)

    def _options(self, load: Load, again: bool, parameters: Sequence[nn.Parameter]) -> TrainOptions:
        """How to train these factors, `down` and `up` of every correction."""
        settings = self.step.settings
        return TrainOptions(
            steps=settings.steps,
            sequences=settings.sequences,
            micro=load.sequences,
            rate=settings.rate or RATE * sqrt(RATE_RANK / mean_rank(parameters)),
            warmup=ceil(settings.warmup * settings.steps),
            schedule=settings.schedule,
            evaluate_every=settings.evaluate_every,
            patience=settings.patience,
            seed=settings.seed,
            checkpointing=again,
        )

    def _measure(self, checkpoint: Checkpoint, what: str) -> tuple[float, Fingerprint]:
        """Perplexity of the held-out sequences, and the probe."""
        return measure(
            checkpoint,
            self.text.batches,
            self.runtime,
            spill_dir=self.target.partial,
            title=f"{self.step.method}: {what}",
        )

    def _show(self, history: History, report: Report, *, original: float) -> None:
        """Rows, the table of all steps and the picture."""
        report.rows = [row for row in history.rows if "heldout_loss" in row]
        report.files |= write_training(
            history,
            self.target.partial,
            original=original,
            title=f"{self.step.name} of {self.source.path.name}",
            draws=wants_plot(self.step.settings.plot),
        )


def mean_rank(parameters: Sequence[nn.Parameter]) -> float:
    """Of corrections, weighed by what a rank of each takes; from `down` and `up` of each."""
    ones = [
        len(up) + down.shape[1] for down, up in zip(parameters[::2], parameters[1::2], strict=True)
    ]
    return sum(one.numel() for one in parameters) / sum(ones)


def _check(source: Checkpoint, settings: RilqSettings) -> None:
    """Raises ConfigError if corrections cannot be stored as the settings ask, or begin so."""
    against = {
        "--no-merge": settings.merge is False,
        f"--start {settings.start}": settings.start in ("eora", "adapter"),
        "--size": settings.size is not None,  # zero points take no bytes more
    }
    for given in (option for option, is_given in against.items() if is_given and settings.pooled):
        raise ConfigError(f"`{given}` does not go with `--pooled`", hint=f"leave out `{given}`")
    if settings.pooled and source.adapter is not None:
        raise ConfigError(
            f"`{source.path}` has an adapter, whose corrections do not fit into zero points",
            hint="leave out `--pooled`, or compensate the checkpoint that it was made from",
        )
    check_start(source, settings)
    if settings.merge and source.packed:
        raise ConfigError(
            f"corrections cannot be added to the packed weights of `{source.path}`",
            hint="leave out `--merge`: they become an adapter; or pass `--pooled`",
        )
