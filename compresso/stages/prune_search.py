"""Searches over what to remove that try it: every candidate is a model that is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import exp
from random import Random
from typing import Any

from compresso.calibration.candidates import Candidate
from compresso.calibration.streams import Metric, Streams
from compresso.errors import ConfigError
from compresso.kernels.evolution import Mix, kinds_of, mixes_near, mutate, random_set
from compresso.kernels.selection import ascending
from compresso.runtime import log
from compresso.stages.prune_choice import Choice, by_score, measured, turns
from compresso.stages.prune_units import Decision, Unit, cost_of, name_of, unit_of

PATIENCE = 1.5  # EvoPress's generations are k (n - k) over this


def blockpruner(choice: Choice) -> Decision:
    """Remove, again and again, the unit without which the model does best.

    The order goes on to the removal that reaches the wanted ratio, even where the nearest ratio
    needs one less.

    Source: Zhong et al., arXiv:2406.10594, Algorithm 1; candidates share what they have in common.
    """
    settings = choice.settings
    metric: Metric = "kl" if settings.metric == "kl" else "loss"
    streams = choice.streams(settings.score_tokens)

    def lost(order: Sequence[Unit], left: Sequence[Unit]) -> list[float]:
        gone = frozenset(sub_block for unit in order for sub_block in unit)
        scores = streams.score([Candidate(gone.union(unit)) for unit in left], metric=metric)
        return [exp(score) for score in scores] if metric == "loss" else scores

    return _one_by_one(choice, settings.metric, lost, streams)


def llm_drop(choice: Choice) -> Decision:
    """The units that turn the residual stream least. Source: He et al., arXiv:2406.15786."""
    if not choice.settings.iterative:
        return by_score(choice, "turn", turns(measured(choice), choice.units))
    absent: set[Unit] = set()

    def turned(order: Sequence[Unit], left: Sequence[Unit]) -> list[float]:
        for unit in order:
            if unit not in absent:
                choice.adapter.remove(unit)
                absent.add(unit)
        return turns(measured(choice), left)

    return _one_by_one(choice, "turn", turned)


def _one_by_one(
    choice: Choice,
    score: str,
    measure: Callable[[Sequence[Unit], Sequence[Unit]], list[float]],
    streams: Streams | None = None,
) -> Decision:
    """Remove the unit of lowest score, and measure again. The state is kept after each removal.

    score:   name of what is measured.
    measure: given the units that are gone, in order, and those that are left, the score of each
             of the latter.
    streams: whose forwards are counted.
    """
    state = choice.target.recall() or {"order": [], "values": [], "forwards": 0, "naive": 0}
    order, values = [unit_of(name) for name in state["order"]], list(state["values"])
    while not choice.reached(order):
        left = [unit for unit in choice.units if unit not in order]
        found = measure(order, left)
        place = ascending(found)[0]
        order.append(left[place])
        values.append(found[place])
        state |= {"order": [name_of(unit) for unit in order], "values": values}
        if streams is not None:
            state |= _counted(state, streams)
        choice.target.remember(state)
        name = f"prune-{choice.step.method}"
        log(f"{name}: `{name_of(order[-1])}` out, {score} {values[-1]:.4g}")
    facts = {} if streams is None else _forwards(state)
    return choice.searched(order, score=score, values=values, facts=facts)


def evopress(choice: Choice) -> Decision:
    """Evolve a set of removals with a fixed budget towards the least KL from the original.

    Each generation is drawn from its own seed, and scored on its own calibration tokens, the
    parent with it; the state is kept after each.

    Source: Sieberling et al., arXiv:2410.14649, section 3 and appendix.
    """
    evolution = _Evolution(choice)
    state = choice.target.recall() or evolution.start()
    while state["generation"] < evolution.generations:
        state = evolution.next(state)
        choice.target.remember(state)
        latest = state["history"][-1]
        log(f"prune-evopress: generation {latest['generation']}, kl {latest['kl']:.4g}")
    removed = [choice.units[place] for place in state["parent"]]
    facts = {"kl": state["history"][-1]["kl"], **_forwards(state)}
    return choice.decision(removed, score="kl", history=state["history"], facts=facts)


def _counted(before: dict[str, Any], streams: Streams) -> dict[str, int]:
    """Halves of blocks run so far, and what they would be without sharing."""
    forwards, naive = streams.take_forwards()
    return {"forwards": before["forwards"] + forwards, "naive": before["naive"] + naive}


def _forwards(state: dict[str, Any]) -> dict[str, float]:
    """The same in whole blocks, for the summary."""
    return {"block_forwards": state["forwards"] / 2, "naive_block_forwards": state["naive"] / 2}


class _Evolution:
    """A (1 + offspring) search over sets of unit numbers."""

    def __init__(self, choice: Choice) -> None:
        self.settings = choice.settings
        self.units = choice.units
        self.costs = [cost_of(unit, choice.costs) for unit in self.units]
        self.kinds = kinds_of(self.costs, range(len(self.units)))
        self.mixes = self._mixes(choice)
        sizes = [(sum(mix), len(self.units) - sum(mix)) for mix in self.mixes]
        self.generations: int = self.settings.generations or max(
            1, int(max(gone * left for gone, left in sizes) / (len(self.kinds) ** 2 * PATIENCE))
        )
        self.streams: Streams = choice.streams(self.settings.score_tokens)

    def _mixes(self, choice: Choice) -> list[Mix]:
        """How many units of each kind may go."""
        if choice.count is None:
            target = self.settings.ratio * choice.source.parameters
            return mixes_near(self.kinds, self.costs, target)
        each, more = divmod(choice.count, len(self.kinds))
        mix = tuple(each + (place < more) for place in range(len(self.kinds)))
        if any(count > len(kind) for count, kind in zip(mix, self.kinds, strict=True)):
            raise ConfigError(
                f"`drop_count`: cannot remove {choice.count} units, as many of each kind"
            )
        return [mix]

    def start(self) -> dict[str, Any]:
        """The best of random sets."""
        random = Random(f"{self.settings.seed} start")
        sets = [
            random_set(self.kinds, random.choice(self.mixes), random)
            for _ in range(self.settings.initial)
        ]
        scores = self._score(sets, self.settings.first_tokens, random)
        best = ascending(scores)[0]
        return self._state({"forwards": 0, "naive": 0, "history": []}, 0, sets[best], scores[best])

    def next(self, state: dict[str, Any]) -> dict[str, Any]:
        """One generation on: the best of the parent and of changed copies of it."""
        number = state["generation"] + 1
        random = Random(f"{self.settings.seed} generation {number}")
        parent = frozenset(state["parent"])
        copies = [
            mutate(parent, self.kinds, self.mixes, random) for _ in range(self.settings.offspring)
        ]
        copies = sorted(set(copies) - {parent}, key=sorted)
        scores = self._score(copies, self.settings.first_tokens, random)
        few = [parent, *(copies[place] for place in ascending(scores)[: self.settings.survivors])]
        scores = self._score(few, None, random)
        best = ascending(scores)[0]
        return self._state(state, number, few[best], scores[best])

    def _state(
        self, before: dict[str, Any], generation: int, parent: frozenset[int], score: float
    ) -> dict[str, Any]:
        names = [name_of(self.units[place]) for place in sorted(parent)]
        entry = {"generation": generation, "kl": score, "removed": names}
        return {
            "generation": generation,
            "parent": sorted(parent),
            "history": [*before["history"], entry],
            **_counted(before, self.streams),
        }

    def _score(
        self, sets: Sequence[frozenset[int]], tokens: int | None, random: Random
    ) -> list[float]:
        """KL from the original on random batches that hold so many tokens; on all if None."""
        candidates = [Candidate(self._sub_blocks(places)) for places in sets]
        return self.streams.score(
            candidates, metric="kl", batches=self.streams.draw(tokens, random)
        )

    def _sub_blocks(self, places: frozenset[int]) -> frozenset[int]:
        gone: list[Unit] = [self.units[place] for place in places]
        return frozenset(sub_block for unit in gone for sub_block in unit)
