"""How much a model suffers from errors in one of its parts: lines through noise, and two orders.

Errors are given as t^2 = |W' - W|^2 / |W|^2. Were the parts to add up, a model's loss would grow by
the sum of slope * t^2 over its parts, whatever made the errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

LEAST_SLOPE = 1e-12
LEVELS = 15
MOST_ERROR = 0.0345  # t^2 of the best 3-bit grid of Gaussian weights: above it losses curve


@dataclass(frozen=True)
class Line:
    """A line through the origin.

    slope: nats per t^2, never below `LEAST_SLOPE`. fit: R^2, 1 if the points are on the line.
    """

    slope: float
    fit: float


def noise_levels(count: int = LEVELS, most: float = MOST_ERROR) -> list[float]:
    """Values of t^2, equally spaced, from most / count to `most`.

    Source: Malinovskii et al., arXiv:2411.17525 (HIGGS), J = 15; the spacing is ours.
    """
    return [most * (level + 1) / count for level in range(count)]


def with_noise(weight: Tensor, error: float, generator: torch.Generator) -> Tensor:
    """The weight plus Gaussian noise whose expected t^2 is `error`, float32 on its device.

    weight:    of any shape and floating type. Not modified.
    generator: on the CPU, so that every device gets the same noise.

    Source: Malinovskii et al., arXiv:2411.17525, equation 9.
    """
    values = weight.float()
    noise = torch.randn(weight.shape, generator=generator).to(weight.device)
    spread = sqrt(error * float(values.square().mean()))
    return values.add(noise, alpha=spread)


def fit_line(errors: Sequence[float], losses: Sequence[float]) -> Line:
    """The line through the origin of least squares.

    errors: t^2 of every measurement, not all 0. losses: what was lost there, in nats.

    A slope that noise in the losses made negative is taken for the least there is.

    Source: Malinovskii et al., arXiv:2411.17525, Algorithm 3.
    """
    pairs = list(zip(errors, losses, strict=True))
    slope = sum(t * lost for t, lost in pairs) / sum(t * t for t, _ in pairs)
    slope = max(slope, LEAST_SLOPE)
    around = sum((lost - slope * t) ** 2 for t, lost in pairs)
    whole = sum(lost**2 for lost in losses)
    return Line(slope, 1 - around / whole if whole > 0 else 1.0)


def zd(weights: Iterable[Tensor]) -> float:
    """The share of a block's weights over one standard deviation above the mean of them all.

    weights: of any shapes and floating types. Not modified.

    The less, the more important. 0 if all weights are equal.

    Source: Dumitru et al., arXiv:2406.17415, z-score distribution.
    """
    parts = list(weights)
    count = sum(part.numel() for part in parts)
    mean = sum(float(part.double().sum()) for part in parts) / count
    variance = sum(float((part.double() - mean).square().sum()) for part in parts) / count
    limit = mean + sqrt(variance)
    return sum(int((part > limit).sum()) for part in parts) / count


def by_importance(scores: Sequence[float]) -> list[int]:
    """Blocks, the most important first: the first, the last, then by falling score.

    scores: of every block: LIM, which is minus the cosine similarity of its input and output, or
            minus `zd`. Of equal scores, the shallower first.

    Source: Dumitru et al., arXiv:2406.17415; that the ends come first is theirs, too.
    """
    blocks = range(len(scores))
    ends = dict.fromkeys([0, len(scores) - 1])
    return [*ends, *sorted(set(blocks) - set(ends), key=lambda block: (-scores[block], block))]
