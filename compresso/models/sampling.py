"""Let a model write token sequences of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from compresso.checkpoint.reader import Checkpoint
from compresso.kernels.sampling import draw_tokens
from compresso.models.adapter import ModelAdapter
from compresso.models.substitution import empty_parameter, put_parameter

Steps = Callable[[range], Iterable[int]]


@contextmanager
def whole(adapter: ModelAdapter, source: Checkpoint) -> Iterator[None]:
    """Keep all weights of the model in memory."""
    names: dict[str, list[str]] = {}
    for name, stored in adapter.stored.items():
        names.setdefault(stored, []).append(name)
    try:
        for stored, used in names.items():
            weight = source.load_weights([stored])[stored].to(adapter.device, adapter.dtype)
            for name in used:
                put_parameter(adapter.model, name, weight)
        yield
    finally:
        for name in adapter.stored:
            empty_parameter(adapter.model, name)


@torch.no_grad()
def write_tokens(
    adapter: ModelAdapter,
    first: Tensor,
    draws: Tensor,
    *,
    temperature: float,
    top_p: float,
    follows: tuple[int, int] | None = None,
    steps: Steps = iter,
) -> Tensor:
    """Continue sequences token by token: (rows, tokens) int64, on the CPU.

    adapter: its weights are all in memory.
    first:   token ids that sequences begin with, (rows,) int64.
    draws:   what decides each token, (rows, tokens), uniform in [0, 1); those of the first are
             not used.
    follows: a token, and the one that always comes after it.
    steps:   goes through the numbers of the steps, to show how far they have come.
    """
    tokens = torch.empty(draws.shape, dtype=torch.int64)
    tokens[:, 0] = first
    cache = None
    for place in steps(range(1, draws.shape[1])):
        last = tokens[:, place - 1]
        output = adapter.model(
            last[:, None].to(adapter.device), past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        drawn = draw_tokens(
            output.logits[:, -1].float().cpu(),
            draws[:, place],
            temperature=temperature,
            top_p=top_p,
        )
        tokens[:, place] = drawn
        if follows is not None:
            tokens[last == follows[0], place] = follows[1]
    return tokens
