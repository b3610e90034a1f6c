"""What the blocks of a model do to the residual stream, measured in one walk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from compresso.calibration.states import Store, enter_blocks
from compresso.calibration.walk import Parts, walk_blocks
from compresso.checkpoint.reader import Checkpoint
from compresso.errors import ResourceError
from compresso.kernels.similarity import pairwise_angular_distance, similarity
from compresso.models.adapter import ModelAdapter
from compresso.runtime import Runtime, track

BYTES_AT_ONCE = 128 * 2**20
FLOAT64_BYTES = 8

TokenChoice = Literal["all", "last"]


@dataclass(frozen=True)
class BlockScores:
    """What a walk measured, per block and as means over tokens.

    similarity: cosine of a block's input and output. attention, mlp: of the residual stream
                before and after either half.
    triangle:   angular distances of all runs of blocks, as `kernels.selection` takes them; None
                if they were not asked for.
    tokens:     tokens the cosines are means over. angle_tokens: the same for the angles.
    """

    similarity: list[float]
    attention: list[float]
    mlp: list[float]
    triangle: list[list[float]] | None
    tokens: int
    angle_tokens: int

    @property
    def influence(self) -> list[float]:
        """Block Influence."""
        return [1.0 - value for value in self.similarity]


def measure_blocks(
    adapter: ModelAdapter,
    source: Checkpoint,
    batches: list[Tensor],
    *,
    angles: TokenChoice | None,
    runtime: Runtime,
    spill_dir: Path,
) -> BlockScores:
    """Walk all tokens through the model once.

    batches: token ids, (B, T) int64 each.
    angles:  tokens the angular distances are averaged over: all, or the last of each sequence;
             None for no distances.

    Keeps one block's weights, the hidden states of all tokens and, for the angles, those between
    every two blocks; what is over `runtime.max_memory` of them goes to a file in `spill_dir`.

    Raises NumericalError if the model overflows, ResourceError if the hidden states fit nowhere.
    """
    budget = runtime.max_memory // 2
    between = None
    if angles is not None:
        between = _Boundaries(adapter, batches, angles, budget=budget, spill_dir=spill_dir)
    states = enter_blocks(adapter, source, batches, probe=None, budget=budget, spill_dir=spill_dir)
    similarities: list[list[float]] = []
    walk = walk_blocks(adapter, source, states)
    for block in track(walk, adapter.count, "measure blocks"):
        means = [_Mean(), _Mean(), _Mean()]
        for batch, parts in enumerate(block.forward_with_parts()):
            for mean, value in zip(means, _similarities(parts), strict=True):
                mean.add(value, parts.input.shape[:-1].numel())
            if between is not None:
                if block.index == 0:
                    between.put(0, batch, parts.input)
                between.put(block.index + 1, batch, parts.output)
        similarities.append([mean.value for mean in means])
    whole, attention, mlp = (list(values) for values in zip(*similarities, strict=True))
    return BlockScores(
        similarity=whole,
        attention=attention,
        mlp=mlp,
        triangle=None if between is None else between.triangle(),
        tokens=states.tokens,
        angle_tokens=0 if between is None else between.tokens,
    )


def _similarities(parts: Parts) -> tuple[float, float, float]:
    return (
        similarity(parts.input, parts.output),
        similarity(parts.input, parts.after_attention),
        similarity(parts.before_mlp, parts.after_mlp),
    )


class _Mean:
    """A mean over tokens of means over some of them."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._tokens = 0

    def add(self, mean: float, tokens: int) -> None:
        self._sum += mean * tokens
        self._tokens += tokens

    @property
    def value(self) -> float:
        return self._sum / self._tokens


class _Boundaries:
    """Hidden states of the same tokens at every boundary: before block 0, after block 0, ..."""

    def __init__(
        self,
        adapter: ModelAdapter,
        batches: Sequence[Tensor],
        choice: TokenChoice,
        *,
        budget: int,
        spill_dir: Path,
    ) -> None:
        self._count = adapter.count + 1
        self._batches = len(batches)
        self._last_only = choice == "last"
        per_batch = [len(batch) if self._last_only else batch.numel() for batch in batches]
        self.tokens = sum(per_batch)
        size = max(per_batch) * int(adapter.config.hidden_size) * adapter.dtype.itemsize
        tensors = self._count * self._batches
        try:
            self._store = Store(
                tensors,
                batch_bytes=size,
                device=adapter.device,
                spill_dir=None if tensors * size <= budget else spill_dir,
            )
        except ResourceError as error:
            raise ResourceError(
                str(error), hint="pass `--tokens last`, a smaller `--nsamples`, or make room"
            ) from None

    def put(self, boundary: int, batch: int, hidden: Tensor) -> None:
        """Keep hidden states, (B, T, d), of the tokens that count."""
        # A copy, as a view of the last token would keep all of them in memory.
        chosen = hidden[:, -1:].clone() if self._last_only else hidden
        self._store[boundary * self._batches + batch] = chosen.flatten(0, 1)

    def triangle(self) -> list[list[float]]:
        """Mean angular distances: row n - 1 holds those of runs of n blocks, by first block."""
        total = torch.zeros(self._count, self._count, dtype=torch.float64)
        for batch in track(range(self._batches), self._batches, "measure angles"):
            held = [self._store[i * self._batches + batch] for i in range(self._count)]
            per_token = FLOAT64_BYTES * self._count * (held[0].shape[-1] + 3 * self._count)
            tokens = max(1, BYTES_AT_ONCE // per_token)
            chunks = (torch.split(state, tokens) for state in held)
            for states in zip(*chunks, strict=True):
                total += pairwise_angular_distance(torch.stack(states)).cpu() * len(states[0])
            for i in range(self._count):
                self._store.release(i * self._batches + batch)
        distances = total / self.tokens
        return [distances.diagonal(n).tolist() for n in range(1, self._count)]
