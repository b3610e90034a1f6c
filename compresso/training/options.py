"""How a model is trained, and what training found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor

from compresso.training.model import TrainingModel

NEXT_TOKEN = "next_token"
"""The part of an objective that is the mean cross-entropy of the next token, in nats."""


class Objective(Protocol):
    """What training makes small."""

    def __call__(self, model: TrainingModel, tokens: Tensor, rows: Tensor) -> dict[str, Tensor]:
        """The `loss`, a mean over tokens, and its named parts, each a mean over tokens.

        tokens: ids, (B, T) int64, on the model's device.
        rows:   (B,) int64, which sequences these are: numbers in the training sequences, with the
                held-out ones counted on after them.

        The part `next_token`, if there is one, is shown as perplexity; it may be computed without
        gradients where it is no part of the loss.
        """
        ...


class Store(Protocol):
    """Where the state of training is kept, so that a killed run can go on."""

    def keep(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Store durably, in place of what was stored by that name before."""
        ...

    def kept(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What was stored last by that name, also by an earlier run."""
        ...


@dataclass(frozen=True)
class TrainOptions:
    """How a model is trained.

    steps:          moves of the optimizer, at most.
    sequences:      that each move is computed from, of all processes together.
    micro:          of them run at once in a process, at most; the gradients of the rest add up.
    rate:           largest learning rate. warmup: steps over which it rises to that. schedule: what
                    it does afterwards.
    weight_decay:   of matrices; vectors are not decayed.
    clip:           longest gradient; a longer one is shortened. 0 for any length.
    evaluate_every: steps between measurements of the held-out loss.
    patience:       measurements without a new best after which training ends; 0 for never.
    seed:           of the order of sequences, and of dropout.
    checkpointing:  keep only what enters each block, and run blocks again on the way back.
    compile:        compile the blocks with torch.compile.
    """

    steps: int
    sequences: int
    micro: int
    rate: float
    warmup: int = 0
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    evaluate_every: int = 25
    patience: int = 5
    seed: int = 0
    checkpointing: bool = False
    compile: bool = False

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.rate
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class History:
    """What training came to.

    rows:      one per step and one for the start, in order: `step`, `tokens` seen, and of what was
               measured there `loss` and its parts, `rate`, `gradient` (length before clipping),
               `heldout_loss`, `heldout_ppl`.
    best_step: after which the held-out loss was least; that state is what the model was left in.
    ended:     why training ended.
    seconds:   that steps took, evaluation apart. tokens: that they read.
    elapsed:   seconds of training in all, evaluation with it, up to when the state was kept last.
    earlier:   of these, those of earlier runs that this one goes on from.
    """

    rows: list[dict[str, float]] = field(default_factory=list)
    best_step: int = 0
    ended: Literal["all steps", "no further gain", "diverged"] = "all steps"
    seconds: float = 0.0
    tokens: int = 0
    elapsed: float = 0.0
    earlier: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on per second, of all processes together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def heldout(self, step: int) -> dict[str, float]:
        """What was measured of the held-out text after a step."""
        return next(row for row in self.rows if row["step"] == step and "heldout_loss" in row)
