"""Which blocks to drop, given scores.

Blocks are numbered from 0. A triangle holds one row per run length: `triangle[n - 1][l]` is the
distance between the input of block l and the output of block l + n - 1, l = 0 ... L - n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

from compresso.errors import ConfigError, NumericalError

Triangle = Sequence[Sequence[float]]


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """The `count` blocks of lowest score, lowest first; of equal scores, the shallower first.

    Raises ConfigError if no block would stay, NumericalError if a score is not finite.

    Source: Men et al., arXiv:2403.03853 (ShortGPT).
    """
    _check_count(count, blocks=len(scores))
    return ascending(scores)[:count]


def ascending(scores: Sequence[float]) -> list[int]:
    """The places of the scores, lowest first; of equal scores, the earlier first.

    Raises NumericalError if a score is not finite.
    """
    _check_finite(scores)
    return sorted(range(len(scores)), key=lambda place: scores[place])


def closest_run(triangle: Triangle, count: int) -> list[int]:
    """The run of `count` blocks whose input and output are nearest; of equal runs, the shallower.

    Every run is allowed, from the one that starts at block 0 to the one that ends at the last.

    Raises ConfigError if no block would stay, NumericalError if a distance is not finite.

    Source: Gromov et al., arXiv:2403.17887, equation 6.
    """
    _check_count(count, blocks=len(triangle))
    distances = triangle[count - 1]
    _check_finite(distances)
    start = min(range(len(distances)), key=lambda block: distances[block])
    return list(range(start, start + count))


def tail(blocks: int, count: int) -> list[int]:
    """The deepest `count` of `blocks` blocks, except that the last block stays.

    Raises ConfigError if no block would stay.

    Source: Gromov et al., arXiv:2403.17887, the simpler strategy of section 3.2.
    """
    _check_count(count, blocks=blocks)
    return list(range(blocks - 1 - count, blocks - 1))


def blocks_for_ratio(
    choose: Callable[[int], list[int]],
    parameters: Sequence[int],
    *,
    total: int,
    ratio: float,
    unit: str = "block",
) -> list[int]:
    """The choice whose share of all parameters is nearest `ratio`; of two as near, the smaller.

    choose:     the blocks to drop if so many are to go, as the functions above give them.
    parameters: of every block.
    total:      parameters of the whole model, embeddings, norms and head included.
    unit:       what messages call a block, if it is half of one.

    Raises ConfigError, naming the nearest ratio that works, if dropping no block, or all blocks,
    is nearest.
    """
    choices = [choose(count) for count in range(1, len(parameters))]
    shares = [sum(parameters[block] for block in choice) / total for choice in choices]
    candidates = [0.0, *shares, sum(parameters) / total]
    nearest = min(range(len(candidates)), key=lambda count: abs(candidates[count] - ratio))
    if not choices:
        raise ConfigError(f"`ratio`: a model of one {unit} has none to remove")
    if nearest == 0:
        raise ConfigError(
            f"`ratio`: {ratio} is less than half a {unit}",
            hint=f"the smallest possible ratio is {shares[0]:.4f}, one {unit}",
        )
    if nearest == len(parameters):
        raise ConfigError(
            f"`ratio`: {ratio} leaves no {unit}",
            hint=f"the largest possible ratio is {shares[-1]:.4f}, all {unit}s but one",
        )
    return choices[nearest - 1]


def _check_count(count: int, *, blocks: int) -> None:
    if not 1 <= count < blocks:
        raise ConfigError(
            f"cannot remove {count} of {blocks} blocks", hint="at least one block must stay"
        )


def _check_finite(scores: Sequence[float]) -> None:
    for place, score in enumerate(scores):
        if not isfinite(score):
            raise NumericalError(f"the score of block `{place}` is not finite")
