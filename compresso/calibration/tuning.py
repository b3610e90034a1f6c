"""Train the rounding of one block's weights so that its output changes least."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from compresso.calibration.states import States
from compresso.kernels.autoround import Latent, decode, latent, settle
from compresso.kernels.grid import Packed
from compresso.models.adapter import ModelAdapter

CHECKS = 5  # of all batches, spread over the steps
MOST_OFFSET = 0.5
LEAST_CLIP, MOST_CLIP = 0.5, 1.5

Rule = Literal["sign", "gradient"]

# By rule: how far from their codes weights are taken to be; of the moves of offsets and of ranges,
# the size, which is that of every move by sign, and otherwise of one by the root mean square.
FARTHEST: dict[Rule, float] = {"sign": 0.49, "gradient": 0.1}
MOVES: dict[Rule, tuple[float, float]] = {"sign": (1.0, 1.0), "gradient": (0.6, 0.01)}
LONGEST_MOVE = 10.0  # in root mean squares


class Batches(Protocol):
    """Hidden states, (B, T, d), by batch: `States`, a `Store` or a list."""

    def __getitem__(self, batch: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Tuned:
    """What training found.

    packed: the linears' codes and grids, by path in the block.
    before: mean squared error of the block's output at the start. after: with `packed`.
    """

    packed: dict[str, Packed]
    before: float
    after: float


@torch.no_grad()
def advance(adapter: ModelAdapter, states: States, index: int) -> None:
    """Replace what enters block `index` by what leaves it, with the weights it has now.

    Run on states of their own, with the original weights, this makes the targets of `tune_block`.
    """
    for batch in range(states.batches):
        states[batch] = _run(adapter, states, index, states[batch], {})


def tune_block(
    adapter: ModelAdapter,
    states: States,
    index: int,
    starts: Mapping[str, tuple[Tensor, Packed]],
    *,
    targets: Batches,
    symmetric: bool,
    steps: int,
    sequences: int,
    seed: int,
    rule: Rule,
) -> Tuned:
    """Move roundings and ranges against their gradient: the `autoround` method.

    adapter:   block `index` is loaded. Its weights at the paths of `starts` have no part in this,
               and none is changed.
    states:    what enters the block, with the error of the blocks before it. Not modified.
    starts:    each linear's original weight, (rows, columns) float32, and where to start, by path
               in the block. Not modified.
    targets:   what the block is to return for every batch of `states`.
    symmetric: keep the zeros of the starts.
    steps:     in each, roundings move by a rate that falls from 1 / steps to 0.
    sequences: a step takes the gradient of about so many; at least of one batch.
    seed:      of the order of batches.
    rule:      "sign" moves all by the same, as the paper does; from plain rounding that is the
               faster. "gradient" moves by its size, so that few codes change at a time; from codes
               that are good already, such as those of GPTQ, "sign" only leads away.

    Of some of the steps and the start, spread over the whole, the one with the least mean squared
    error over all batches is kept: on these the result is not worse than the start.

    Peak memory: three numbers per weight of the block in float32 and their gradients, the start,
    the best so far, and what the block keeps of one batch for the way back.

    Works the same whether or not the caller has gradients switched off.

    Source: Cheng et al., arXiv:2309.05516, Algorithm 1.
    """
    tuning = _Tuning(adapter, states, index, targets, rule)
    found = {
        path: latent(weight, packed, symmetric=symmetric, farthest=FARTHEST[rule])
        for path, (weight, packed) in starts.items()
    }
    variables = {path: (one.offset(), one.clip()) for path, one in found.items()}
    best = {path: packed for path, (_, packed) in starts.items()}
    before = least = tuning.error(best)
    order = _shuffled(states, sequences, seed + index)
    checked = {steps * (check + 1) // CHECKS for check in range(CHECKS)}
    for step in range(steps):
        tuning.step(found, variables, next(order), rate=(1 - step / steps) / steps)
        if step + 1 in checked:
            packed = {path: settle(one, *variables[path]) for path, one in found.items()}
            error = tuning.error(packed)
            if error < least:
                best, least = packed, error
    return Tuned(best, before, least)


class _Tuning:
    """A block, what enters it and what should leave it."""

    def __init__(
        self, adapter: ModelAdapter, states: States, index: int, targets: Batches, rule: Rule
    ) -> None:
        self._adapter = adapter
        self._states = states
        self._index = index
        self._targets = targets
        self._rule = rule

    @torch.no_grad()
    def error(self, packed: Mapping[str, Packed]) -> float:
        """Mean squared error of the block's output over all batches."""
        weights = {path: one.decode() for path, one in packed.items()}
        total = 0.0
        for batch in range(self._states.batches):
            total += self._squares(batch, weights).item()
            self._states.release(batch)
        return total / (self._states.tokens * self._states.width)

    def step(
        self,
        found: Mapping[str, Latent],
        variables: Mapping[str, tuple[Tensor, Tensor]],
        batches: list[int],
        *,
        rate: float,
    ) -> None:
        """Move the variables, in place, against the gradient of some batches."""
        with torch.enable_grad():
            leaves = {
                path: tuple(one.detach().requires_grad_() for one in pair)
                for path, pair in variables.items()
            }
            weights = {path: decode(found[path], *leaves[path]) for path in found}
            cut = {path: weight.detach().requires_grad_() for path, weight in weights.items()}
            for batch in batches:
                self._squares(batch, cut).backward()
                self._states.release(batch)
            for path, weight in weights.items():
                weight.backward(cut[path].grad)
        for path, (offset, clip) in variables.items():
            pairs = zip((offset, clip), leaves[path], MOVES[self._rule], strict=True)
            for variable, leaf, size in pairs:
                assert leaf.grad is not None
                variable.sub_(self._direction(leaf.grad), alpha=rate * size)
            offset.clamp_(-MOST_OFFSET, MOST_OFFSET)
            clip.clamp_(LEAST_CLIP, MOST_CLIP)

    def _direction(self, gradient: Tensor) -> Tensor:
        if self._rule == "sign":
            return gradient.sign()
        size = gradient.square().mean().sqrt()
        relative = torch.where(size > 0, gradient / size, 0.0)
        return relative.clamp_(-LONGEST_MOVE, LONGEST_MOVE)

    def _squares(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """The sum of squared errors of the block's output for a batch."""
        hidden = self._states[batch]
        output = _run(self._adapter, self._states, self._index, hidden, weights)
        return (output.float() - self._targets[batch].float()).square().sum()


def _run(
    adapter: ModelAdapter,
    states: States,
    index: int,
    hidden: Tensor,
    weights: Mapping[str, Tensor],
) -> Tensor:
    """What block `index` returns, with other weights, (out, in), for some of its linears."""
    arguments = states.arguments(index, hidden)
    transposed = adapter.family.transposed
    changed = {
        f"{path}.weight": (weight.T if transposed else weight).to(hidden.dtype)
        for path, weight in weights.items()
    }
    output: Tensor = functional_call(
        adapter.blocks[index], changed, (hidden, *arguments.positional), arguments.named
    )
    return output


def _shuffled(states: States, sequences: int, seed: int) -> Iterator[list[int]]:
    """Batches of about so many sequences, each batch once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    count = max(1, round(sequences / len(states[0])))
    left: list[int] = []
    while True:
        while len(left) < count:
            left += torch.randperm(states.batches, generator=generator).tolist()
        taken, left = left[:count], left[count:]
        yield taken
