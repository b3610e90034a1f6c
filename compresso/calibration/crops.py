"""What to learn from and what to judge by, of one run of text."""

from __future__ import annotations

import torch
from torch import Tensor

from compresso.errors import CheckpointError

KEPT_BACK = 0.1  # of a text without a held-out part, to judge by what nobody learned from


def crops(
    stream: Tensor, shape: tuple[int, int], heldout: int, *, seed: int, dataset: str
) -> Tensor:
    """Random crops of a text; the last `heldout` evenly spaced ones of an end without the others.

    shape: how many, and of how many tokens.

    The share of the text that is this end is that of the sequences, or a sequence if that is more.
    """
    count, length = shape
    end = 0
    if heldout:
        if len(stream) < 2 * length:
            raise CheckpointError(
                f"dataset `{dataset}` holds {len(stream)} tokens, fewer than two sequences of"
                f" {length}: one to learn from and one to judge by",
                hint="use a longer text, or a smaller `--seqlen`",
            )
        end = round(heldout / count * len(stream))
        end = min(max(end, length), len(stream) - length)
    start = len(stream) - end
    generator = torch.Generator().manual_seed(seed)
    learnt = (count - heldout,)
    starts = torch.randint(0, start - length + 1, learnt, generator=generator).tolist()
    starts += [start + number * (end - length) // max(heldout - 1, 1) for number in range(heldout)]
    return torch.stack([stream[start : start + length] for start in starts])


def apart(tokens: Tensor, dataset: str) -> tuple[Tensor, Tensor]:
    """What to learn from and, at the end, what to judge by: runs of sequences or of ids."""
    back = max(1, int(KEPT_BACK * len(tokens)))
    if len(tokens) < 2:
        raise CheckpointError(
            f"`{dataset}` holds too little to learn from and to judge by",
            hint="use a longer text, or a smaller `--seqlen`",
        )
    return tokens[:-back], tokens[-back:]
