"""Corrections to begin training with: those that `eora` finds."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compresso.calibration.following import Following
from compresso.calibration.walk import enter_blocks, walk_blocks
from compresso.checkpoint.kept import KeptState
from compresso.checkpoint.reader import Checkpoint
from compresso.compensate_settings import RilqSettings
from compresso.errors import ConfigError
from compresso.models.structure import structure_of
from compresso.runtime import Runtime, track
from compresso.stages.compensate_forms import Beside, Factors, factors_of
from compresso.stages.compensate_work import Work
from compresso.stages.pair import Pair

START = "start"


def start_of(source: Checkpoint, settings: RilqSettings) -> Literal["gaussian", "eora", "adapter"]:
    """What training begins with; if nobody says, an adapter, or what `eora` finds if it can."""
    if settings.start != "auto":
        return settings.start
    if source.adapter is not None:
        return "adapter"
    return "gaussian" if settings.pooled or _refusal(source) else "eora"


def check_start(source: Checkpoint, start: str) -> None:
    """Raises ConfigError if training cannot begin so.

    With an adapter it can if there is one, and otherwise if there is none; with what `eora` finds,
    if blocks do not share linears, which lack different things in each, and have no corrections
    within, which would be made up for again.
    """
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
    if start == "eora" and (reason := _refusal(source)):
        raise ConfigError(f"blocks of `{source.path}` {reason}", hint="leave out `--start eora`")


def _refusal(source: Checkpoint) -> str:
    """Why training cannot begin with what `eora` finds; empty if it can."""
    structure = structure_of(source.config)
    if structure.shared:
        return "share linears, and lack different things"
    return "have corrections of their own, which count already" if structure.rank else ""


@torch.no_grad()
def eora_start(
    source: Checkpoint,
    original: Checkpoint,
    batches: list[Tensor],
    rank: int,
    runtime: Runtime,
    *,
    store: KeptState,
) -> Factors:
    """What makes up best for all that was lost up to every linear, found block by block.

    batches: token ids, (B, T) int64 each. store: has it, if an earlier run found it.

    Linears that lack nothing have no correction. The source is as `check_start` wants it.
    """
    if (kept := store.kept(START)) is not None:
        return factors_of(kept[0])
    pair = Pair.open(source, original, runtime)
    work, form = Work(pair, weighted=True, match=1.0), Beside(pair.adapter, source)
    states, theirs = (
        enter_blocks(
            adapter,
            checkpoint,
            batches,
            probe=None,
            budget=runtime.max_memory // 2,
            spill_dir=store.directory,
        )
        for adapter, checkpoint in ((pair.adapter, source), (pair.theirs, original))
    )
    following = Following(pair.theirs, original, theirs, pair.blocks, pair.adapter.structure)
    beside: dict[str, Tensor] = {}
    blocks = walk_blocks(pair.adapter, source, states)
    for block in track(blocks, pair.adapter.count, "start: eora"):
        ranks = {
            pair.name(block.index, path): min(rank, *pair.shape(block.index, path))
            for path in pair.paths(block.index)
        }
        following.follow(block.index, keep=True)
        beside |= work.correct(block, following, form, ranks).beside
    store.keep(START, beside, {})
    return factors_of(beside)
