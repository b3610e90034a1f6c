"""Run a step: recognise finished work, prove new work, publish it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compresso import registry
from compresso.beside import ROWS, put_adapter, side_files
from compresso.calibration.data import Calibration
from compresso.card import CARD, ORIGIN
from compresso.checkpoint.checksums import CHECKSUMS, checksums
from compresso.checkpoint.kept import KeptState
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import KEPT, STAMP, WORK, CheckpointWriter
from compresso.errors import CheckpointError, GateError, Interrupted, ResourceError
from compresso.exporting import finish_export
from compresso.gates import check_gates
from compresso.preflight import check_room, check_source, original_key
from compresso.provenance import RECORD, lineage, make_record, read_record, step_key
from compresso.proving import not_proved, prove_here
from compresso.publishing import card_of, origin_of
from compresso.recipe import Step
from compresso.report import Report, rows_to_csv, show_report
from compresso.runtime import Runtime, launched, log, warn
from compresso.settings import CalibrationSettings
from compresso.step_data import load_data
from compresso.training.loop import steps_kept
from compresso.training.processes import Follower, Processes, join
from compresso.workspace import check_output


@dataclass(frozen=True)
class Outcome:
    """What a step came to. `reused`: it had been done before."""

    step: Step
    path: Path
    key: str
    report: Report
    reused: bool


def run_step(
    step: Step,
    source: Checkpoint,
    calibration: CalibrationSettings,
    target: Path,
    runtime: Runtime,
    *,
    fresh: bool = False,
) -> Outcome:
    """Run one stage on `source`, or recognise that `target` is its result already.

    fresh: discard what an unfinished run left behind, instead of going on from it.

    Raises CheckpointError if `target` holds something else, GateError if the output fails its
    proof (nothing is published then) or a gate of the step (the report is), Interrupted if the
    user stops it, and what the stage raises.
    """
    check_source(step, source)
    with join(runtime.device).first_alone():
        data = load_data(step, source, calibration, runtime, target.parent)
    key = key_of(step, source, data, runtime)
    outcome = find_finished(step, target, key)
    if outcome is None:
        outcome = run_new(step, source, data, target, runtime, fresh=fresh)
    settle(outcome)
    return outcome


def key_of(step: Step, source: Checkpoint, data: Calibration | None, runtime: Runtime) -> str:
    """The key of a step's result."""
    return step_key(
        step,
        source=source.key,
        data=data.key if data else None,
        dtype=runtime.compute_dtype(source.dtype),
        original=original_key(step, lineage(source)[0].key),
    )


def find_finished(step: Step, target: Path, key: str) -> Outcome | None:
    """The outcome in `target` if it is that of this key; None if `target` is free.

    Raises CheckpointError if it holds anything else.
    """
    check_output(target)
    record = read_record(target)
    if not record:
        return None
    if record["key"] != key:
        raise CheckpointError(
            f"`{target}` was made with other settings or from another checkpoint",
            hint="choose another `-o`, or remove it",
        )
    log(f"{step.name}: reused `{target}`")
    return Outcome(step, target, key, Report.from_json(record["report"]), reused=True)


def run_new(
    step: Step,
    source: Checkpoint,
    data: Calibration | None,
    target: Path,
    runtime: Runtime,
    *,
    fresh: bool,
) -> Outcome:
    """Run a step whose `target` is free, and publish what it makes. It is not settled yet.

    Of several processes the first runs it, with the help of the others if they can share the work.
    """
    check_room(step, source, target)
    beside = " with its adapter" if source.adapter else ""
    log(f"{step.name}: `{source.path}`{beside} -> `{target}`")
    work = _Work(step, source, data, runtime, key_of(step, source, data, runtime))
    stage, processes = registry.stage(step.stage), join(runtime.device)
    processes.wait()  # until all have seen that there is nothing yet
    if not processes.first:
        return _follow(work, target, processes)
    if stage.leaves is None and not stage.exports:
        report = _write_report(work, target)
    else:
        with CheckpointWriter(target, key=work.key, parts=_parts(source), fresh=fresh) as writer:
            if stage.together:
                processes.wait()
            report = _write_checkpoint(work, writer)
    processes.wait()
    return Outcome(step, target, work.key, report, reused=False)


def _follow(work: _Work, target: Path, processes: Processes) -> Outcome:
    """Help the first process, or wait for it; what it came to."""
    try:
        if registry.stage(work.step.stage).together:
            processes.wait()
            work.run(Follower(target))
        processes.wait()
    except KeyboardInterrupt:
        raise Interrupted("interrupted") from None
    outcome = find_finished(work.step, target, work.key)
    assert outcome is not None
    return outcome


def settle(outcome: Outcome) -> None:
    """Show what a step measured, then hold it to its gates. Raises GateError if one fails."""
    if launched().index == 0:
        show_report(outcome.report, outcome.step.name)
    for message in outcome.report.warnings:
        warn(message)
    check_gates(outcome.step.gates, outcome.report.summary, written=str(outcome.path))


@dataclass(frozen=True)
class _Work:
    step: Step
    source: Checkpoint
    data: Calibration | None
    runtime: Runtime
    key: str

    def run(self, target: CheckpointWriter | Follower | Path) -> Report:
        stage = registry.load(registry.stage(self.step.stage).code)
        started = time.perf_counter()
        report: Report = stage(self.source, self.step, self.data, target, self.runtime)
        report.summary["seconds"] = time.perf_counter() - started + report.earlier
        return report

    def record(self, report: Report) -> dict[str, Any]:
        return make_record(
            self.step,
            self.source,
            key=self.key,
            data=self.data.record if self.data else None,
            report=report.to_json(),
        )


def _write_checkpoint(work: _Work, writer: CheckpointWriter) -> Report:
    """Run a stage that writes a checkpoint; prove the checkpoint, then publish it."""
    try:
        report = work.run(writer)
        if report.written is not None:
            proved = finish_export(work.source, work.step, report, writer, work.runtime)
        else:
            proved = _finish(work, writer, report)
        _write_text(writer.partial / ROWS, rows_to_csv(report.rows))
        record = work.record(report) | proved | {ORIGIN: origin_of(work.source)}
        record[CHECKSUMS] = checksums(writer.partial, without=(*KEPT, STAMP, RECORD))
        writer.write_record(record)
        _write_text(writer.partial / CARD, card_of(writer.partial, record))
        writer.publish()
    except GateError as error:
        raise GateError(
            str(error), hint=f"nothing was published; `{writer.partial}` is kept to look at"
        ) from error
    except KeyboardInterrupt:
        saved = len(list(writer.partial.glob("model-*.safetensors")))
        further = "" if writer.recall() is None else " and the search so far"
        if steps := steps_kept(KeptState(writer.partial / WORK)):
            further = f" and training up to step {steps}"
        raise Interrupted(
            f"interrupted; {saved} finished parts{further} are saved in `{writer.partial}`",
            hint="run the same command again to go on from there",
        ) from None
    return report


def _finish(work: _Work, writer: CheckpointWriter, report: Report) -> dict[str, Any]:
    """Add everything but the record, and prove the whole; what the record has to say of it.

    Not proved if the runtime is not to: the report warns of it, then and whenever it is reused.
    """
    if report.config is None or report.fingerprint is None:
        raise AssertionError(f"stage `{work.step.stage}` leaves nothing to write or to prove")
    files = side_files(work.source, report.config)
    writer.finalize(config=report.config, side_files=files, expected=report.expected)
    adapter = put_adapter(Checkpoint(writer.partial), report, writer.target, work.runtime)
    dtype = work.runtime.compute_dtype(work.source.dtype)
    expected = replace(report.fingerprint, dtype=dtype)
    written = Checkpoint(writer.partial)
    proved: dict[str, Any] = {"fingerprint": expected.to_json(), "carried": report.carried}
    if work.runtime.verify:
        proof = prove_here(written, expected, work.runtime, carried=report.carried)
        proved["proof"] = asdict(proof)
    else:
        report.warnings.append(not_proved(writer.target))
    return adapter | proved


def _write_report(work: _Work, target: Path) -> Report:
    """Run a stage that only measures, in a directory that is published when it is whole."""
    # It holds nothing to go on from later, so it is this process's own, and removed on failure.
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    with _writing(target):
        partial.mkdir(parents=True)
    try:
        report = work.run(partial)
        _write_text(partial / ROWS, rows_to_csv(report.rows))
        _write_text(partial / RECORD, json.dumps(work.record(report), indent=1))
        with _writing(target):
            partial.replace(target)
    except KeyboardInterrupt:
        raise Interrupted("interrupted; a measurement starts again from the beginning") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _write_text(path: Path, text: str) -> None:
    with _writing(path):
        path.write_text(text, encoding="utf-8")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"cannot write `{path}`: {error.strerror}") from error


def _parts(source: Checkpoint) -> int:
    """One part per block, and one for what is in no block."""
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(count := source.config.get(name), int):
            return count + 1
    raise CheckpointError(f"`{source.path}/config.json` does not say how many blocks there are")
