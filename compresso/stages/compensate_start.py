"""What training of corrections begins with: nothing, an adapter, or what `eora` finds."""

from __future__ import annotations

from math import ceil
from typing import Literal

import torch
from torch import Tensor

from compresso.calibration.walk import walk_blocks
from compresso.checkpoint.kept import KeptState
from compresso.checkpoint.reader import Checkpoint
from compresso.checkpoint.writer import WORK, CheckpointWriter
from compresso.compensate_settings import DEFAULT_RANK, EoraSettings, RilqSettings
from compresso.errors import ConfigError
from compresso.models.corrected import without_adapter
from compresso.models.structure import structure_of
from compresso.runtime import Runtime, track
from compresso.stages.compensate_forms import Factors, factors_of
from compresso.stages.compensate_plan import (
    added_bytes,
    check_budget,
    check_dense,
    common_rank,
    make_plan,
)
from compresso.stages.compensate_run import EoraRun
from compresso.stages.compensate_work import Work

START = "start"

Kind = Literal["gaussian", "eora", "adapter"]


def start_of(source: Checkpoint, settings: RilqSettings) -> Kind:
    """What training begins with; if nobody says, an adapter, or what `eora` finds if it can.

    source: with its adapter, if it has one.
    """
    if settings.start != "auto":
        return settings.start
    if source.adapter is not None:
        return "adapter"
    return "gaussian" if settings.pooled or _refusal(source) else "eora"


def check_start(source: Checkpoint, settings: RilqSettings) -> None:
    """Raises ConfigError if training cannot begin so, or corrections not be as large as is asked.

    With an adapter it can if there is one, and otherwise if there is none; with what `eora` finds,
    if blocks do not share linears, which lack different things in each, and have no corrections
    within, which would be made up for again.
    """
    start = start_of(source, settings)
    if start == "adapter" and source.adapter is None:
        raise ConfigError(
            f"`{source.path}` has no adapter to begin with", hint="leave out `--start adapter`"
        )
    if start != "adapter" and source.adapter is not None:
        raise ConfigError(
            f"`{source.path}` has an adapter, which would be lost",
            hint="pass `--start adapter` to go on from it, or compensate the checkpoint that it"
            " was made from",
        )
    given = "--rank" if settings.rank is not None else "--size"
    if start == "adapter" and (settings.rank is not None or settings.size is not None):
        raise ConfigError(
            f"the adapter of `{source.path}` has its ranks, and keeps them",
            hint=f"leave out `{given}`, or compensate the checkpoint that it was made from",
        )
    check_dense(source, settings)
    if start == "eora" and (reason := _refusal(source)):
        raise ConfigError(f"blocks of `{source.path}` {reason}", hint="leave out `--start eora`")


def _refusal(source: Checkpoint) -> str:
    """Why training cannot begin with what `eora` finds; empty if it can."""
    structure = structure_of(source.config)
    if structure.shared:
        return "share linears, and lack different things"
    return "have corrections of their own, which count already" if structure.rank else ""


def most_ranks(source: Checkpoint, settings: RilqSettings, paths: list[str]) -> int:
    """The rank of all corrections; where ranks differ, of one for all that is as large, rounded up.

    source: with its adapter, if it has one. paths: of the linears to correct, in the checkpoint.

    Raises ConfigError if the size that the settings name is too little.
    """
    bare, held = without_adapter(source), source.adapter
    shapes = {path: bare.weight_info(f"{path}.weight").shape for path in paths}
    ones = {path: sum(shape) for path, shape in shapes.items()}
    if held is not None:
        return ceil(sum(held.ranks[path] * one for path, one in ones.items()) / sum(ones.values()))
    rank = settings.rank or DEFAULT_RANK
    if settings.size is not None:
        room = added_bytes(settings.size, source)
        if start_of(source, settings) == "gaussian":
            rank = common_rank([(rows, columns) for rows, columns in shapes.values()], room, bare)
        else:
            check_budget(room, (one * bare.dtype.itemsize for one in ones.values()))
            rank = ceil(room / bare.dtype.itemsize / sum(ones.values()))
    return min(rank, max(min(shape) for shape in shapes.values()))  # higher ones add nothing


def start_factors(
    source: Checkpoint,
    original: Checkpoint,
    settings: RilqSettings,
    batches: list[Tensor],
    target: CheckpointWriter,
    runtime: Runtime,
) -> Factors | None:
    """The corrections to begin with, by path in the checkpoint; None for nothing.

    source:  with its adapter, if it has one; as `check_start` wants it.
    batches: token ids that `eora` reads, (B, T) int64 each.
    target:  what is written: has what `eora` finds, if an earlier try of this run found it.
    """
    start = start_of(source, settings)
    if start == "gaussian":
        return None
    if start == "adapter":
        assert source.adapter is not None
        return source.adapter.load(source.adapter.paths)
    store = KeptState(target.partial / WORK)
    if (kept := store.kept(START)) is not None:
        return factors_of(kept[0])
    wanted = EoraSettings(rank=settings.rank, size=settings.size, merge=False)
    found = _eora(source, original, wanted, batches, target, runtime)
    store.keep(START, found, {})
    return factors_of(found)


@torch.no_grad()
def _eora(
    source: Checkpoint,
    original: Checkpoint,
    wanted: EoraSettings,
    batches: list[Tensor],
    target: CheckpointWriter,
    runtime: Runtime,
) -> dict[str, Tensor]:
    """What `eora` would put beside the source. Linears that lack nothing have no correction."""
    plan = make_plan(source, original, wanted, runtime)
    work = Work(plan.pair, weighted=True, match=wanted.matched)
    run = EoraRun(plan, work, batches, target, runtime)
    ranks = run.ranks()
    states, following = run.enter(work)
    assert following is not None
    found: dict[str, Tensor] = {}
    adapter = plan.pair.adapter
    for block in track(walk_blocks(adapter, source, states), adapter.count, "start: eora"):
        following.follow(block.index, keep=True)
        found |= work.correct(block, following, plan.forms[block.index], ranks).beside
    return found
