"""What can be removed from a model, and how much of it an order of removals comes to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.families import Family
from compresso.kernels.selection import blocks_for_ratio
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import halves

HALVES = ("attention", "mlp")
# The halves that a unit of each kind is made of.
KINDS = {"sub-block": ((0,), (1,)), "attention": ((0,),), "mlp": ((1,),), "block": ((0, 1),)}

Unit = tuple[
    int, ...
]  # sub-blocks that go together; 2 * block is an attention, 2 * block + 1 an MLP


@dataclass(frozen=True)
class Decision:
    """What is removed and why, in the plain values that a part's report can hold.

    costs:   parameters of every sub-block; 0 for one that the model lacks already.
    removed: sub-blocks, ascending.
    score:   name of what the choice went by, empty if nothing was measured.
    values:  the score of every unit that has one, by the unit's name.
    order:   names of the units a search removed, first one first; it may go on after `removed`.
    history: what a search measured on its way.
    facts:   more for the summary.
    """

    costs: list[int]
    removed: list[int]
    score: str = ""
    values: dict[str, float] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def half_of(family: Family, name: str) -> int | None:
    """Whether a tensor of a block belongs to attention, 0, or to the MLP, 1; None if to neither.

    name: within the block, such as `self_attn.q_proj.weight`.
    """
    for number, half in enumerate(halves(family)):
        if name.startswith(tuple(f"{path}." for path in half.modules + half.norms)):
            return number
    return None


def sub_block_costs(adapter: ModelAdapter, source: Checkpoint) -> list[int]:
    """The number of weights in every sub-block, its norms included."""
    costs = [0] * (2 * adapter.count)
    for block in range(adapter.count):
        prefix = adapter.block_prefix(block)
        for name in source.weight_names():
            if name.startswith(prefix):
                info = source.weight_info(name)
                half = half_of(adapter.family, name.removeprefix(prefix))
                if half is not None and info.dtype.is_floating_point:
                    costs[2 * block + half] += prod(info.shape)
    return costs


def name_of(unit: Unit) -> str:
    """How users write a unit: `3` is block 3, `a3` its attention and `m3` its MLP."""
    block, half = divmod(unit[0], 2)
    return str(block) if len(unit) == 2 else f"{'am'[half]}{block}"


def unit_of(name: int | str) -> Unit:
    """The unit of that name, as `name_of` gives it."""
    text = str(name)
    if text[0] in "am":
        return (2 * int(text[1:]) + "am".index(text[0]),)
    return (2 * int(text), 2 * int(text) + 1)


def free_units(
    kind: str, costs: Sequence[int], *, protect: Iterable[int | str], keep: Iterable[int]
) -> list[Unit]:
    """The units of a kind that may be removed, in execution order.

    protect: blocks to leave alone: "first", "last" or numbers. keep: more of them.

    Raises ConfigError if a protected block does not exist, or fewer than two units are left.
    """
    blocks = len(costs) // 2
    words = {"first": 0, "last": blocks - 1}
    locked = {words[place] if isinstance(place, str) else place for place in (*protect, *keep)}
    if wrong := sorted(block for block in locked if block >= blocks):
        raise ConfigError(
            f"`protect`: there is no block `{wrong[0]}`", hint=f"blocks are 0 to {blocks - 1}"
        )
    units = []
    for block in range(blocks):
        for parts in KINDS[kind]:
            unit = tuple(2 * block + half for half in parts if costs[2 * block + half])
            if unit and block not in locked:
                units.append(unit)
    if len(units) < 2:
        raise ConfigError("too much is protected: there is nothing to choose between")
    return units


def cost_of(unit: Iterable[int], costs: Sequence[int]) -> int:
    """Parameters of a unit, or of any sub-blocks."""
    return sum(costs[sub_block] for sub_block in unit)


def enough(
    order: Sequence[Unit],
    costs: Sequence[int],
    *,
    total: int,
    ratio: float | None,
    count: int | None,
) -> list[Unit]:
    """The first units of an order that come to what was asked for.

    total: parameters of the whole model. ratio: share of them to remove. count: units to remove.

    Raises ConfigError, naming what is possible, if that is nothing or all of them.
    """
    word = "block" if all(len(unit) == 2 for unit in order) else "unit"
    if count is not None:
        if count >= len(order):
            raise ConfigError(
                f"cannot remove {count} of {len(order)} {word}s",
                hint=f"at least one {word} must stay",
            )
        return list(order[:count])
    assert ratio is not None
    parameters = [cost_of(unit, costs) for unit in order]
    places = list(range(len(order)))
    chosen = blocks_for_ratio(lambda n: places[:n], parameters, total=total, ratio=ratio, unit=word)
    return [order[place] for place in chosen]
