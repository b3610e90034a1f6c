"""Random gates on a model's units whose chance to be open is learned, within a budget.

A gate scales what a unit adds to the residual stream: 1 keeps the unit, 0 removes it. A gate that
is merely scaled down tells little about removal, as a network hardly feels it when all its units
shrink together. Gates that are drawn at random, often exactly 0 or 1, let the loss see what is
removed, and what else is missing at the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

# The stretch and the temperature of the source: about a third of a balanced gate's draws are
# strictly between 0 and 1, which is where the gradient comes from.
LOW, HIGH = -0.1, 1.1
TEMPERATURE = 2 / 3
_BRACKET = 60.0  # logits whose sigmoid is 0 or 1 for every purpose
_HALVINGS = 64
_SMALLEST = 1e-6  # noise, away from 0 and 1


def draw_noise(pairs: int, gates: int, generator: torch.Generator) -> Tensor:
    """Noise for `sample_gates`, (2 * pairs, gates) float32, uniform on the open interval (0, 1).

    The second half mirrors the first, so that each gate that one row closes is open in another.
    """
    noise = torch.rand(pairs, gates, generator=generator).clamp(_SMALLEST, 1 - _SMALLEST)
    return torch.cat([noise, 1 - noise])


def open_probability(logits: Tensor) -> Tensor:
    """The chance that a gate is not 0, the shape of `logits`.

    logits: one per gate, any shape, floating. Not modified.

    Source: Louizos et al., arXiv:1712.01312 (hard concrete gates), equation 12.
    """
    return torch.sigmoid(logits - TEMPERATURE * log(-LOW / HIGH))


def sample_gates(logits: Tensor, noise: Tensor) -> Tensor:
    """Gates from 0 to 1, the shape of `noise`; differentiable in `logits`.

    logits: (gates,), floating. noise: (..., gates), uniform on the open interval (0, 1). Neither
            is modified.

    Source: Louizos et al., arXiv:1712.01312 (hard concrete gates), equations 10 and 11.
    """
    relaxed = torch.sigmoid((torch.logit(noise) + logits) / TEMPERATURE)
    return (relaxed * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def within_budget(logits: Tensor, costs: Sequence[float], *, kept: float) -> Tensor:
    """The logits, all moved by one number so that open gates are expected to cost just so much.

    logits: (gates,), floating. Not modified.
    costs:  of keeping each gate's unit open, such as its parameters, all above 0.
    kept:   share of the sum of all costs, strictly between 0 and 1.

    Differentiable: a gradient that asks all gates to open by the same amount becomes 0, as the
    others have to close for one to open.
    """
    if not 0 < kept < 1:
        raise ValueError(f"cannot keep a share of {kept}")
    exact = logits.detach().double()
    weights = torch.tensor(costs, dtype=torch.float64, device=logits.device)
    weights = weights / weights.sum()
    lowest, highest = -_BRACKET - float(exact.max()), _BRACKET - float(exact.min())
    for _ in range(_HALVINGS):
        middle = (lowest + highest) / 2
        if float((weights * open_probability(exact + middle)).sum()) < kept:
            lowest = middle
        else:
            highest = middle
    chance = open_probability(exact + lowest)
    # Of the equation that defines the shift: its derivative by each logit, up to the sign.
    slopes = weights * chance * (1 - chance)
    slopes = (slopes / slopes.sum()).to(logits.dtype)
    return logits + lowest - ((slopes * logits).sum() - (slopes * logits.detach()).sum())


def blend(before: Tensor, after: Tensor, gate: Tensor) -> Tensor:
    """What a gated unit makes of the residual stream: before + gate * (after - before).

    before, after: the same shape and floating dtype, also that of the result. gate: a scalar,
                   float32. None is modified.

    Exactly `after` for a gate of 1 and exactly `before` for 0.
    """
    return torch.lerp(before.float(), after.float(), gate).to(after.dtype)


def scale(output: Tensor, gate: Tensor) -> Tensor:
    """gate * output, rounded once; `output` itself for a gate of 1.

    output: any shape, floating. gate: a scalar, float32. Neither is modified.
    """
    return (output.float() * gate).to(output.dtype)
