"""A few hundred tokens that every stage runs through the model it makes, to prove the output by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PROBE_TOKENS = 256
SAFE_TOKENS = 64  # where a model does not say how many it takes
PROBE_SEED = 1234


def probe_tokens(vocabulary: int, longest: int = SAFE_TOKENS) -> Tensor:
    """The probe for a model of `vocabulary` tokens: (1, T) int64, always the same.

    longest: most tokens that the model takes; T is that, or 256 if it takes more.

    Random tokens visit unusual states, need no text, and so serve data-free methods as well.
    """
    generator = torch.Generator().manual_seed(PROBE_SEED)
    shape = (1, min(longest, PROBE_TOKENS))
    return torch.randint(0, vocabulary, shape, generator=generator)


def probe_of(config: Any) -> Tensor:
    """The probe for the model of a transformers config."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or SAFE_TOKENS
    return probe_tokens(text.vocab_size, longest)
