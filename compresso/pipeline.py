"""Run the steps of a recipe one after another, each on what the one before it made."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresso import registry
from compresso.calibration.data import Calibration
from compresso.checkpoint.reader import Checkpoint, open_checkpoint
from compresso.errors import ResourceError
from compresso.preflight import check_source, original_key
from compresso.provenance import history, lineage, read_record, step_key
from compresso.recipe import Recipe, Step, dump_recipe
from compresso.report import Report
from compresso.run import Outcome, find_finished, key_of, run_new, settle
from compresso.runtime import Runtime, launched, log
from compresso.step_data import load_data, read_by

RESOLVED = "compresso-recipe.yaml"


@dataclass(frozen=True)
class Place:
    """Where a step of a recipe writes."""

    step: Step
    path: Path

    @property
    def writes(self) -> bool:
        """Whether it makes a checkpoint."""
        return registry.stage(self.step.stage).leaves is not None


def run_recipe(
    recipe: Recipe,
    directory: Path,
    runtime: Runtime,
    *,
    fresh: bool = False,
    keep_last: bool = False,
) -> list[Outcome]:
    """Run every step, or recognise what was done before, into `directory/NN-stage-method`.

    keep_last: once all steps are done, delete the checkpoints they made, but for the last.

    Raises what `run_step` raises; what was finished by then stays.
    """
    places = [
        Place(step, directory / f"{number:02d}-{step.name}")
        for number, step in enumerate(recipe.steps, start=1)
    ]
    original = open_checkpoint(recipe.model)
    for place in places:
        check_source(place.step, original)
        if place.writes:
            break
    data = _load_all(recipe, original, runtime, directory)
    _write_resolved(recipe, directory)
    outcomes = _find_whole_run(places, original, data, runtime)
    if outcomes is None:
        outcomes = _run_steps(places, original, data, runtime, fresh=fresh)
    if keep_last and launched().index == 0:
        _delete_intermediate(places, outcomes)
    return outcomes


def _load_all(
    recipe: Recipe, original: Checkpoint, runtime: Runtime, directory: Path
) -> list[Calibration | None]:
    """Each step's token batches. One tokenizer serves the whole run, so one reading does."""
    loaded: dict[Any, Calibration | None] = {}
    data = []
    for step in recipe.steps:
        read = read_by(step)
        if read not in loaded:
            loaded[read] = load_data(step, original, recipe.calibration, runtime, directory)
        data.append(loaded[read])
    return data


def _run_steps(
    places: list[Place],
    original: Checkpoint,
    data: list[Calibration | None],
    runtime: Runtime,
    *,
    fresh: bool,
) -> list[Outcome]:
    outcomes, source = [], original
    for place, batches in zip(places, data, strict=True):
        key = key_of(place.step, source, batches, runtime)
        outcome = find_finished(place.step, place.path, key)
        if outcome is None:
            check_source(place.step, source)
            outcome = run_new(place.step, source, batches, place.path, runtime, fresh=fresh)
        settle(outcome)
        outcomes.append(outcome)
        if place.writes:
            source = Checkpoint(place.path)
    return outcomes


def _find_whole_run(
    places: list[Place], original: Checkpoint, data: list[Calibration | None], runtime: Runtime
) -> list[Outcome] | None:
    """The outcomes, if every step was done before; None if there is something to do.

    A checkpoint that `keep_last` deleted counts as done where the last one descends from it.
    """
    last = next((place.path for place in reversed(places) if place.writes), None)
    past = {record["key"]: record for record in history(read_record(last))} if last else {}
    outcomes, source, first = [], original.key, lineage(original)[0].key
    for place, batches in zip(places, data, strict=True):
        key = step_key(
            place.step,
            source=source,
            data=batches.key if batches else None,
            dtype=runtime.compute_dtype(original.dtype),
            original=original_key(place.step, first),
        )
        record = read_record(place.path) or (past.get(key) if place.writes else None) or {}
        if record.get("key") != key:
            return None
        report = Report.from_json(record["report"])
        outcomes.append(Outcome(place.step, place.path, key, report, reused=True))
        source = key if place.writes else source
    for outcome in outcomes:
        log(f"{outcome.step.name}: reused `{outcome.path}`")
        settle(outcome)
    return outcomes


def _write_resolved(recipe: Recipe, directory: Path) -> None:
    """Keep the recipe with every default written out beside what it makes."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / RESOLVED).write_text(dump_recipe(recipe), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"cannot write `{directory}`: {error.strerror}") from error


def _delete_intermediate(places: list[Place], outcomes: list[Outcome]) -> None:
    """Delete the checkpoints of this run but the last; nothing whose key is not this run's."""
    made = [outcome for place, outcome in zip(places, outcomes, strict=True) if place.writes]
    for outcome in made[:-1]:
        if read_record(outcome.path).get("key") == outcome.key:
            log(f"deleting `{outcome.path}`")
            shutil.rmtree(outcome.path)
