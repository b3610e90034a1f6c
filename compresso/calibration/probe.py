"""A few tokens that every stage runs through the model it makes, to prove the output by."""

from __future__ import annotations

import torch
from torch import Tensor

PROBE_TOKENS = 64
PROBE_SEED = 1234


def probe_tokens(vocabulary: int) -> Tensor:
    """The probe for a model of `vocabulary` tokens: (1, 64) int64, always the same.

    Random tokens visit unusual states, need no text, and so serve data-free methods as well.
    """
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randint(0, vocabulary, (1, PROBE_TOKENS), generator=generator)
