"""Draw the next token from a model's scores."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_tokens(logits: Tensor, draws: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """One token of each row, (rows,) int64, where its share of the probability holds the draw.

    logits:      (rows, vocabulary), any floating dtype. Not modified.
    draws:       (rows,) in [0, 1), uniform if tokens are to come as often as they are probable. A
                 row's token depends on its own draw and logits alone.
    temperature: that logits are divided by, above 0.
    top_p:       in (0, 1]: only the most probable tokens that together have so much are drawn,
                 and always the first.

    Source: top_p as Holtzman et al., arXiv:1904.09751.
    """
    probability = torch.softmax(logits.double() / temperature, dim=-1)
    order = None
    if top_p < 1:
        probability, order = probability.sort(dim=-1, descending=True, stable=True)
        before = probability.cumsum(-1) - probability
        probability = probability.masked_fill(before >= top_p, 0.0)
    reached = probability.cumsum(-1)
    wanted = draws.to(reached)[:, None] * reached[:, -1:]
    places = torch.searchsorted(reached, wanted, right=True)
    # The last token that can be drawn at all, where rounding leads past it.
    possible = (probability > 0) * torch.arange(1, probability.shape[-1] + 1, device=logits.device)
    places = torch.minimum(places, possible.argmax(-1, keepdim=True))
    return (places if order is None else order.gather(-1, places)).squeeze(-1)
