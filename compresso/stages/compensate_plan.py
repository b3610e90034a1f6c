"""Decide where a run's corrections go and how large they are, before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from compresso.calibration.opening import open_adapter
from compresso.checkpoint.reader import Checkpoint
from compresso.compensate_settings import DEFAULT_RANK, EoraSettings
from compresso.errors import ConfigError
from compresso.kernels.lowrank import rank_within
from compresso.models.corrected import CorrectedCheckpoint, is_factor
from compresso.models.structure import structure_of
from compresso.runtime import Runtime, format_bytes, parse_bytes
from compresso.stages.compensate_forms import Beside, Form, Merged, Within
from compresso.stages.pair import Pair


@dataclass(frozen=True)
class Plan:
    """What a run corrects, and how that is stored.

    pair:   the compressed model, with room for corrections if these are in the blocks, and its
            original.
    shapes: of all linears that may be corrected, by name in the checkpoint: (rows, columns).
    rank:   of all corrections, none above the rank of its linear; None if each has one of its
            own, within `budget` bytes.
    """

    pair: Pair
    form: Form
    shapes: dict[str, tuple[int, int]]
    rank: int | None
    budget: int


def make_plan(
    source: Checkpoint, original: Checkpoint, settings: EoraSettings, runtime: Runtime
) -> Plan:
    """Decide what is corrected and how, and refuse what cannot be.

    Raises ConfigError if the source has an adapter or nothing to correct, or corrections cannot be
    stored as the settings ask.
    """
    check_no_adapter(source)
    structure = structure_of(source.config)
    within = bool(structure.shared or structure.rank)
    _check_form(source, settings, within=within)
    pair = Pair.open(source, original, runtime)
    blocks = [
        block
        for block in range(pair.adapter.count)
        if settings.match or source.packed or pair.differs(block)
    ]
    if not blocks:
        raise ConfigError(
            f"every linear of `{source.path}` has the weight that it has in the original",
            hint="pass `--match 1` to make up for what lies between them",
        )
    shapes = {pair.name(b, path): pair.shape(b, path) for b in blocks for path in pair.paths(b)}
    budget = added_bytes(settings.size, source) if settings.size is not None else 0
    rank = None if settings.size is not None else settings.rank or DEFAULT_RANK
    if not within:
        form: Form = Merged(pair.adapter, source.dtype)
        if source.packed or settings.merge is False:
            form = Beside(pair.adapter, source)
        return Plan(pair, form, shapes, rank, budget)
    if rank is None:
        rank = _common_rank(source, shapes, budget, settings)
    prefix = pair.adapter.blocks_prefix
    view = CorrectedCheckpoint(source, prefix=prefix, rank=rank, corrected=blocks)
    pair = replace(pair, source=view, adapter=open_adapter(view, runtime))
    return Plan(pair, Within(pair.adapter, view), shapes, rank, budget)


def check_no_adapter(source: Checkpoint) -> None:
    """Raises ConfigError if the source is corrected already."""
    if source.adapter is not None:
        raise ConfigError(
            f"`{source.path}` has an adapter",
            hint="compensate the checkpoint that it was made from",
        )


def added_bytes(size: str, source: Checkpoint) -> int:
    """Bytes in `+2MB`, or in `+5%` of what is stored."""
    amount = size.strip().removeprefix("+").strip()
    if amount.endswith("%"):
        return int(float(amount.removesuffix("%")) / 100 * source.stored_bytes)
    return parse_bytes(amount)


def _check_form(source: Checkpoint, settings: EoraSettings, *, within: bool) -> None:
    if settings.merge and source.packed:
        raise ConfigError(
            f"corrections cannot be added to the packed weights of `{source.path}`",
            hint="leave out `--merge`: they become an adapter beside them",
        )
    if settings.merge and within:
        raise ConfigError(
            f"corrections cannot be added to the weights that blocks of `{source.path}` share",
            hint="leave out `--merge`: every block stores its own",
        )
    if settings.size is not None and settings.merge is not False and not (source.packed or within):
        raise ConfigError(
            "corrections that are added to dense weights need no bytes, so `size` says nothing",
            hint="pass `--rank`, or `--no-merge` for an adapter",
        )


def _common_rank(
    source: Checkpoint,
    shapes: dict[str, tuple[int, int]],
    budget: int,
    settings: EoraSettings,
) -> int:
    """The highest rank of all corrections within the budget. Those it has are replaced."""
    freed = sum(source.info(name).nbytes for name in source.names() if is_factor(name))
    rank = rank_within(shapes.values(), parameters=(budget + freed) // source.dtype.itemsize)
    if not rank:
        least = sum(rows + columns for rows, columns in shapes.values()) * source.dtype.itemsize
        raise ConfigError(
            f"`size`: {settings.size} is too little for corrections of {len(shapes)} linears",
            hint=f"rank 1 takes {format_bytes(least - freed)}",
        )
    return rank
