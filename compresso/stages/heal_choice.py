"""What a heal method trains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod
from random import Random
from typing import Any

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ConfigError
from compresso.models.adapter import ModelAdapter
from compresso.models.structure import borrowed_linears, halves, structure_of
from compresso.provenance import history, read_record
from compresso.recipe import Step
from compresso.stages.whole_model import own_linears


@dataclass(frozen=True)
class Trained:
    """What moves; everything else stays as it is, to the bit.

    linears: paths in the checkpoint of those that get a correction of low rank.
    tensors: names in the checkpoint of those that change themselves.
    drawn:   sets of them of which only some move at a time; what is in none moves always.
    active:  how many of these sets.
    """

    linears: list[str] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)
    drawn: list[list[str]] = field(default_factory=list)
    active: int = 0

    def parameters(self, source: Checkpoint) -> int:
        """How many weights can change, corrections apart."""
        return _weights(source, self.tensors)

    def at_once(self, source: Checkpoint) -> int:
        """How many of these move in one step, at most."""
        largest = sorted(self.drawn, key=lambda names: _weights(source, names), reverse=True)
        moving = {name for names in largest[: self.active] for name in names}
        resting = {name for names in self.drawn for name in names} - moving
        return _weights(source, {*self.tensors} - resting)


def trained(adapter: ModelAdapter, source: Checkpoint, step: Step) -> Trained:
    """What the method of a step trains.

    Raises ConfigError if the method cannot train this model.
    """
    settings: Any = step.settings
    if step.method in ("lora", "qlora"):
        held = source.adapter.paths if source.adapter is not None else []
        return Trained(linears=list(dict.fromkeys(_linears(adapter, settings.linears) + held)))
    if source.adapter is not None:
        raise ConfigError(
            f"`{step.method}` would lose the adapter beside the weights of `{source.path}`",
            hint="use `--method lora`, which goes on from it",
        )
    if step.method == "norms":
        return Trained(tensors=_vectors(adapter, source))
    found = _of_weights(adapter, source, step)
    packed = [name for name in found.tensors if name.removesuffix(".weight") in _packed(source)]
    if packed:
        raise ConfigError(
            f"`{step.method}` trains weights, but `{packed[0]}` in `{source.path}` is stored as"
            " codes",
            hint="use `--method qlora`, or heal first and quantize then",
        )
    return found


def _of_weights(adapter: ModelAdapter, source: Checkpoint, step: Step) -> Trained:
    """What the methods train that train weights themselves."""
    settings: Any = step.settings
    every = range(adapter.count)
    if step.method == "full":
        return Trained(tensors=_ordered(adapter, source, adapter.stored.values()))
    if step.method == "lisa":
        drawn = [_of_blocks(adapter, source, [block]) for block in every]
        tensors = _ordered(adapter, source, adapter.stored.values())
        if settings.active > adapter.count:
            raise ConfigError(f"`--active {settings.active}`: there are {adapter.count} blocks")
        return Trained(tensors=tensors, drawn=drawn, active=settings.active)
    if step.method == "last-k":
        if settings.last > adapter.count:
            raise ConfigError(f"`--last {settings.last}`: there are {adapter.count} blocks")
        ends = (f"{adapter.family.final_norm}.", f"{adapter.family.head}.")
        outside = {stored for name, stored in adapter.stored.items() if name.startswith(ends)}
        blocks = _of_blocks(adapter, source, every[-settings.last :])
        return Trained(tensors=_ordered(adapter, source, {*blocks, *outside}))
    blocks = _of_blocks(adapter, source, beside_removed(source, adapter.count, settings.reach))
    return Trained(tensors=blocks)


def beside_removed(source: Checkpoint, count: int, reach: int) -> list[int]:
    """The blocks next to where blocks or halves of blocks were removed, ascending.

    count: blocks that are left. reach: how many on each side.

    Raises ConfigError if nothing was removed, as far as the record and config.json say.
    """
    gaps: set[int] = set()  # in front of which block, as they are numbered by then
    for record in history(read_record(source.path)):
        if record["step"]["stage"] == "prune":
            gone = record["report"]["summary"]["removed_blocks"]
            gaps = {gap - sum(block < gap for block in gone) for gap in {*gaps, *gone}}
    structure = structure_of(source.config)
    gaps |= {*structure.no_attention, *(block + 1 for block in structure.no_mlp)}
    if not gaps:
        raise ConfigError(
            f"nothing was removed from `{source.path}`, so no block is beside a removed one",
            hint="use `--method last-k` or `--method lora`",
        )
    found = {block for gap in gaps for block in range(gap - reach, gap + reach)}
    return sorted(block for block in found if 0 <= block < count)


def draw(trained: Trained, *, active: int, interval: int, seed: int, step: int) -> list[int]:
    """Which of the trained tensors, by number, a step moves: those of a few sets, and the rest.

    active: sets at a time. interval: steps between draws. step: from 0.

    Source: Pan et al., arXiv:2403.17919 (LISA).
    """
    generator = Random(f"{seed} {step // interval}")
    chosen = generator.sample(range(len(trained.drawn)), active)
    moved = {name for number in chosen for name in trained.drawn[number]}
    resting = {name for names in trained.drawn for name in names} - moved
    return [number for number, name in enumerate(trained.tensors) if name not in resting]


def _weights(source: Checkpoint, names: Iterable[str]) -> int:
    return sum(prod(source.weight_info(name).shape) for name in names)


def _linears(adapter: ModelAdapter, which: str) -> list[str]:
    """Paths of the linears of all blocks that have their own, in order."""
    attention, mlp = halves(adapter.family)
    wanted = {"attention": attention.linears, "mlp": mlp.linears}.get(
        which, attention.linears + mlp.linears
    )
    ends = tuple(f".{path}" for path in wanted)
    return [path for path in own_linears(adapter) if path.endswith(ends)]


def _of_blocks(adapter: ModelAdapter, source: Checkpoint, blocks: Iterable[int]) -> list[str]:
    """The tensors that blocks use, also those that another block has."""
    used: set[str] = set()
    for block in blocks:
        used |= set(adapter.block_tensors(block))
        for path in borrowed_linears(adapter.family, adapter.structure, block):
            own = f"{adapter.family.blocks}.{path}."
            used |= {stored for name, stored in adapter.stored.items() if name.startswith(own)}
    return _ordered(adapter, source, used)


def _vectors(adapter: ModelAdapter, source: Checkpoint) -> list[str]:
    """Weights of norms, and biases."""
    names = adapter.stored.values()
    return _ordered(adapter, source, [n for n in names if len(source.weight_info(n).shape) == 1])


def _ordered(adapter: ModelAdapter, source: Checkpoint, names: Iterable[str]) -> list[str]:
    """The same, each once, in the model's order."""
    wanted = set(names)
    return [name for name in dict.fromkeys(adapter.stored.values()) if name in wanted]


def _packed(source: Checkpoint) -> set[str]:
    return set(source.packing.shapes) if source.packed else set()
