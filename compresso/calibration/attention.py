"""How much attention each token receives: its importance to the linears of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from compresso.errors import ConfigError

SCORES_BYTES = 64 * 2**20


class ReceivedAttention(TorchFunctionMode):
    """While it is entered, notes what attention its thread computes.

    It watches the two functions that attention of transformers ends in, whichever model calls them
    and with whatever masks, windows, biases and caps. Fused attention is not run but answered with
    zeros: its probabilities are all that is asked for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._received: Tensor | None = None

    @property
    def received(self) -> Tensor:
        """The probability that each token received, over all heads and queries: (B, T) float32.

        Raises ConfigError if no attention was seen.
        """
        if self._received is None:
            raise ConfigError(
                "the attention of this model does not show its probabilities",
                hint="use a method that does not weigh tokens",
            )
        return self._received

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function of torch, and look at its result if it is attention."""
        named = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            query, _, value = args[:3]
            self._received = attention_received(*args[:2], **_of_interest(named))
            return value.new_zeros(1).expand(*query.shape[:-1], value.shape[-1])
        result = func(*args, **named)
        if func is functional.softmax and result.ndim == 4:
            self._received = result.float().sum(dim=(1, 2))
        return result


def attention_received(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The probability that each key receives over all heads and queries, (B, T) float32.

    query:  (B, heads, T, width). key: (B, heads or a divisor of it, T, width).
    mask:   broadcasts to (B, heads, T, T); True where a query sees a key, or added to the scores.
    causal: no query sees a later key. scale: of the scores; 1 / sqrt(width) if None.

    Arguments are not modified. Holds `SCORES_BYTES` of scores at a time, or one row of each head.
    """
    sequences, heads, length, width = query.shape
    sharing = heads // key.shape[1]
    factor = width**-0.5 if scale is None else scale
    seen = None if mask is None else mask.expand(sequences, heads, -1, -1)
    received = torch.zeros(sequences, length, device=query.device)
    step = max(1, SCORES_BYTES // (4 * sharing * length))
    for sequence in range(sequences):
        for first in range(0, heads, sharing):
            keys = key[sequence, first // sharing].float()
            for start in range(0, length, step):
                stop = min(start + step, length)
                limit = stop if causal else length
                queries = query[sequence, first : first + sharing, start:stop].float()
                scores = (queries * factor) @ keys[:limit].T
                if causal:
                    later = torch.ones_like(scores[0], dtype=torch.bool).triu_(start + 1)
                    scores.masked_fill_(later, -torch.inf)
                if seen is not None:
                    part = seen[sequence, first : first + sharing, start:stop, :limit]
                    if part.dtype == torch.bool:
                        scores.masked_fill_(~part, -torch.inf)
                    else:
                        scores += part
                received[sequence, :limit] += scores.softmax(dim=-1).sum(dim=(0, 1))
    return received


def token_importance(received: Tensor, *, least: float) -> Tensor:
    """Weights of tokens, (B, T) float32, with the mean 1 in every sequence (RSQ, Sung et al. 2025).

    received: attention that each token received, (B, T). Not modified.
    least:    weight of the token that received least, as a fraction of that of the one that
              received most; between them, weights grow as attention does. 1: all are equal.
    """
    exact = received.double()
    low, high = exact.aminmax(dim=1, keepdim=True)
    weights = least + (1 - least) * (exact - low) / (high - low)
    # Plainly 1 where all receive the same, so that grams do not change by rounding.
    return torch.where(high > low, weights / weights.mean(dim=1, keepdim=True), 1.0).float()


def _of_interest(named: dict[str, Any]) -> dict[str, Any]:
    return {
        "mask": named.get("attn_mask"),
        "causal": named.get("is_causal", False),
        "scale": named.get("scale"),
    }
