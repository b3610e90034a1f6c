"""Hold the weights that an export stores against those that it was to store, one by one.

What the whole model says cannot tell that: a format that rounds is proved by what its own file
says, and in that a tensor in the place of another is not seen.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from compresso.checkpoint.reader import Checkpoint
from compresso.errors import GateError

# Shares of a weight and of the largest of its tensor: what rounding to bfloat16, or scales and
# offsets to float16, comes to.
OF_WEIGHT, OF_LARGEST = 2.0**-7, 2.0**-9
TILE = 2**24  # weights compared at once


def check_weights(
    model: Checkpoint, stored: Checkpoint, *, rounded: Collection[str], carried: Collection[str]
) -> None:
    """Read everything back that was written, and compare.

    model:   what was to be stored. stored: reads what was, by the same names.
    rounded: dense weights that were rounded anew. Any sensible rounding leaves them nearer to what
             they were than zeros are; another tensor's weights are further away.
    carried: tensors that no module takes, which are left out here.

    Peak memory: two weights. Raises GateError naming the first weight that is another.
    """
    known = set(model.weight_names()) - set(carried)  # some formats add zeros of their own
    for name in (name for name in stored.weight_names() if name in known):
        expected = model.load_weights([name])[name]
        found = stored.load_weights([name])[name]
        if expected.shape != found.shape:
            raise GateError(
                f"`{name}` is stored with shape {tuple(found.shape)}, not {tuple(expected.shape)}"
            )
        if name in rounded:
            _check_rounded(name, expected, found)
        else:
            _check_same(name, expected, found)


def _check_same(name: str, expected: Tensor, found: Tensor) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    for one, other in _tiles(expected, found):
        if not bool(((one - other).abs() <= OF_WEIGHT * one.abs() + OF_LARGEST * largest).all()):
            raise GateError(
                f"`{name}` is not stored as it is: a weight is off by"
                f" {float((one - other).abs().max()):.3g}, the largest being {largest:.3g}"
            )


def _check_rounded(name: str, expected: Tensor, found: Tensor) -> None:
    error = whole = 0.0
    for one, other in _tiles(expected, found):
        error += float((one - other).double().square().sum())
        whole += float(one.double().square().sum())
    if not error <= whole:  # so that NaN fails
        share = (error / whole) ** 0.5 if whole else float("inf")
        raise GateError(
            f"`{name}` is not what rounding makes of it: it is off by {share:.0%} of its norm"
        )


def _tiles(expected: Tensor, found: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of both, float32."""
    pairs = zip(expected.flatten().split(TILE), found.flatten().split(TILE), strict=True)
    for one, other in pairs:
        yield one.float(), other.to(torch.float32)
