"""Evolving how many bits every input group gets, towards the least KL that is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from compresso.checkpoint.writer import CheckpointWriter
from compresso.kernels.allocation import Table, switched
from compresso.kernels.selection import ascending
from compresso.runtime import log

Score = Callable[[Sequence[Sequence[int]], int | None, Random], list[float]]


def evolve(
    starts: Sequence[Sequence[int]],
    sizes: Table,
    budget: int,
    score: Score,
    target: CheckpointWriter,
    *,
    settings: Any,
) -> dict[str, Any]:
    """The best choice found, as the state that `target` remembers after each generation.

    starts:   choices to begin with: the level of every group, within the budget.
    sizes:    of every group at every level, in bytes. budget: bytes for all of them.
    score:    given choices, and how many random tokens to measure on or None for all, the KL of
              each from the original.
    settings: has `generations`, `offspring`, `survivors`, `first_tokens` and `seed`.

    Copies of the parent are measured on a few random tokens, the best of them on all, where the
    parent was measured, too: its KL never rises. Every generation is drawn from its own seed.

    Source: Sieberling et al., arXiv:2410.14649, section 3.
    """
    state = target.recall() or _start(starts, score, settings.seed)
    while state["generation"] < settings.generations:
        state = _next(state, sizes, budget, score, settings)
        target.remember(state)
        log(f"bits: generation {state['generation']}, kl {state['kl']:.4g}")
    return state


def _start(starts: Sequence[Sequence[int]], score: Score, seed: int) -> dict[str, Any]:
    scores = score(starts, None, Random(f"{seed} start"))
    best = ascending(scores)[0]
    log(f"bits: from kl {scores[best]:.4g}")
    return {
        "generation": 0,
        "parent": list(starts[best]),
        "kl": scores[best],
        "history": [{"generation": 0, "kl": scores[best], "starts": scores}],
    }


def _next(
    state: dict[str, Any], sizes: Table, budget: int, score: Score, settings: Any
) -> dict[str, Any]:
    """One generation on: the best of the parent and of changed copies of it."""
    number = state["generation"] + 1
    random = Random(f"{settings.seed} generation {number}")
    parent = tuple(state["parent"])
    drawn = [tuple(switched(parent, sizes, budget, random)) for _ in range(settings.offspring)]
    copies = sorted(set(drawn) - {parent})
    best, kl = parent, state["kl"]
    if copies:
        first = score(copies, settings.first_tokens, random)
        few = [copies[place] for place in ascending(first)[: settings.survivors]]
        scores = score(few, None, random)
        place = ascending(scores)[0]
        if scores[place] < kl:
            best, kl = few[place], scores[place]
    return {
        "generation": number,
        "parent": list(best),
        "kl": kl,
        "history": [*state["history"], {"generation": number, "kl": kl}],
    }
