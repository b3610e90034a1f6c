"""Decide where a run's corrections go and how large they are, before any work starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from compresso.calibration.opening import open_adapter
from compresso.checkpoint.reader import Checkpoint
from compresso.compensate_settings import DEFAULT_RANK, EoraSettings, SizedSettings
from compresso.errors import ConfigError
from compresso.kernels.lowrank import correction_parameters, rank_within
from compresso.models.corrected import BIAS, CorrectedCheckpoint, is_factor, without_adapter
from compresso.models.structure import structure_of
from compresso.runtime import Runtime, format_bytes, parse_bytes
from compresso.stages.compensate_forms import Beside, Form, Merged, Within
from compresso.stages.pair import Pair

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Plan:
    """What a run corrects, and how that is stored.

    pair:   the compressed model, with room for corrections if these are in the blocks, and its
            original.
    forms:  of every block's corrections.
    shapes: of all linears that may be corrected, by name in the checkpoint: (rows, columns).
    ranks:  of their corrections; None if they are to be chosen, within `budget` bytes.
    changed: whether any linear has not the weight that it had.
    """

    pair: Pair
    forms: list[Form]
    shapes: Shapes
    ranks: dict[str, int] | None
    budget: int
    changed: bool


def make_plan(
    source: Checkpoint, original: Checkpoint, settings: EoraSettings, runtime: Runtime
) -> Plan:
    """Decide what is corrected and how, and refuse what cannot be.

    An adapter that the source has is replaced.

    Raises ConfigError if there is nothing to correct, corrections cannot be stored as the settings
    ask, or no correction has so few bytes.
    """
    source = without_adapter(source)
    structure = structure_of(source.config)
    within = bool(structure.shared or structure.rank)
    _check_form(source, settings, within=within)
    pair = Pair.open(source, original, runtime)
    blocks = list(range(pair.adapter.count))
    changed = blocks if source.packed else [block for block in blocks if pair.differs(block)]
    if not settings.matched:
        blocks = changed
    if not blocks:
        raise ConfigError(
            f"every linear of `{source.path}` has the weight that it has in the original",
            hint="leave out `--match 0` to make up for what lies between them",
        )
    budget = added_bytes(settings.size, source) if settings.size is not None else 0
    if within:
        return _plan_within(pair, settings, runtime, blocks, budget)
    form: Form = Merged(pair.adapter, source.dtype)
    if source.packed or settings.merge is False:
        form = Beside(pair.adapter, source)
    shapes = _shapes(pair, blocks)
    ranks = None
    if settings.size is not None:
        check_budget(budget, (sum(shape) * source.dtype.itemsize for shape in shapes.values()))
    else:
        # Where no weight was changed, corrections only make up for blocks that are gone, and merged
        # they are the better the higher their rank; elsewhere that would give back the original.
        highest = max(max(shape) for shape in shapes.values())
        free = isinstance(form, Merged) and not changed
        rank = settings.rank or (highest if free else DEFAULT_RANK)
        ranks = {name: min(rank, *shape) for name, shape in shapes.items()}
    return Plan(pair, [form] * pair.adapter.count, shapes, ranks, budget, bool(changed))


def _plan_within(
    pair: Pair, settings: EoraSettings, runtime: Runtime, blocks: list[int], budget: int
) -> Plan:
    """For a model whose blocks share weights, or have corrections already, which are replaced.

    Where the weights are dense, a block that shares none has its correction merged.
    """
    source, structure = pair.source, pair.adapter.structure
    users = Counter(map(structure.owner, range(pair.adapter.count)))
    corrected = [
        block
        for block in blocks
        if source.packed or users[structure.owner(block)] > 1 or block in structure.corrected
    ]
    shapes, stored = _shapes(pair, blocks), _shapes(pair, corrected)
    rank = settings.rank or DEFAULT_RANK
    if settings.size is not None:
        freed = sum(source.info(name).nbytes for name in source.names() if is_factor(name))
        one = CorrectedCheckpoint(
            source, prefix=pair.adapter.blocks_prefix, rank=1, corrected=corrected
        )
        biases = sum(one.info(name).nbytes for name in one.names() if name.endswith(f".{BIAS}"))
        rank = common_rank(stored.values(), budget, source, freed=freed - biases)
    prefix, held = pair.adapter.blocks_prefix, rank if corrected else 0
    view = CorrectedCheckpoint(source, prefix=prefix, rank=held, corrected=corrected)
    pair = replace(pair, source=view, adapter=open_adapter(view, runtime))
    inside, merged = Within(pair.adapter, view), Merged(pair.adapter, view.dtype)
    forms: list[Form] = [
        inside if block in corrected else merged for block in range(pair.adapter.count)
    ]
    ranks = {name: rank if name in stored else min(rank, *shape) for name, shape in shapes.items()}
    return Plan(pair, forms, shapes, ranks, budget, changed=True)


def _shapes(pair: Pair, blocks: list[int]) -> Shapes:
    return {
        pair.name(block, path): pair.shape(block, path)
        for block in blocks
        for path in pair.paths(block)
    }


def added_bytes(size: str, source: Checkpoint) -> int:
    """Bytes in `+2MB`, or in `+5%` of what is stored."""
    amount = size.strip().removeprefix("+").strip()
    if amount.endswith("%"):
        return int(float(amount.removesuffix("%")) / 100 * source.stored_bytes)
    return parse_bytes(amount)


def check_budget(budget: int, costs: Iterable[int]) -> None:
    """Raises ConfigError if no linear can be corrected.

    budget: bytes. costs: of rank 1 for every linear that lacks something, in bytes.
    """
    least = min(costs, default=None)
    if least is None:
        raise ConfigError(
            "no linear lacks anything of its output, so there is nowhere to put bytes",
            hint="leave out `--size`",
        )
    if budget < least:
        raise ConfigError(
            f"`size`: {format_bytes(budget)} is too little to correct any linear",
            hint=f"rank 1 of the smallest takes {format_bytes(least)}",
        )


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
    if not within:
        check_dense(source, settings)


def check_dense(source: Checkpoint, settings: SizedSettings) -> None:
    """Raises ConfigError if a size is given for corrections that are added to dense weights."""
    if settings.size is not None and settings.merge is not False and not source.packed:
        raise ConfigError(
            "corrections that are added to dense weights need no bytes, so `size` says nothing",
            hint="pass `--rank`, or `--no-merge` for an adapter",
        )


def common_rank(
    shapes: Collection[tuple[int, int]], budget: int, source: Checkpoint, *, freed: int = 0
) -> int:
    """The highest rank that corrections of all these linears can have within a budget.

    budget: bytes. freed: by what they replace, besides.

    Raises ConfigError if not even rank 1 fits.
    """
    itemsize = source.dtype.itemsize
    rank = rank_within(shapes, parameters=(budget + freed) // itemsize)
    if not rank:
        count, least = len(shapes), correction_parameters(shapes, rank=1) * itemsize - freed
        raise ConfigError(
            f"`size`: {format_bytes(budget)} is too little for corrections of {count} linears",
            hint=f"rank 1 takes {format_bytes(least)}",
        )
    return rank
