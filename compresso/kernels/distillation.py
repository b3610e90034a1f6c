"""What a model that learns from another is held to: its predictions, and the way states point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compresso.kernels.divergence import relative_entropy


@dataclass(frozen=True)
class TopScores:
    """The most likely tokens of predictions.

    tokens:            (..., count) int64, the most likely first.
    log_probabilities: (..., count + 1) float32, theirs, and last that of all other tokens together.
    """

    tokens: Tensor
    log_probabilities: Tensor


def softened_divergence(original: Tensor, trained: Tensor, *, temperature: float) -> Tensor:
    """t^2 KL(softmax(original / t) || softmax(trained / t)) over the vocabulary, (...) float32.

    original, trained: logits, (..., vocabulary), any floating dtype. Not modified.
    temperature:       t, above 0. Its square keeps gradients as large at every temperature.

    A token the original gives probability 0 adds nothing. Exactly 0 where both are the same.

    Source: Hinton et al., arXiv:1503.02531, section 2.
    """
    expected = _log_softmax(original, temperature)
    actual = _log_softmax(trained, temperature)
    return temperature**2 * relative_entropy(expected, actual)


def top_scores(logits: Tensor, count: int, *, temperature: float) -> TopScores:
    """The most likely tokens under softmax(logits / temperature), and what the others come to.

    logits: (..., vocabulary), any floating dtype. Not modified.
    count:  at least 1; of fewer tokens than the vocabulary has, all but the last are taken.
    """
    scores = _log_softmax(logits, temperature)
    top = scores.topk(min(count, scores.shape[-1] - 1), dim=-1)
    return TopScores(top.indices, torch.cat((top.values, _others(scores, top.indices)), -1))


def top_divergence(original: TopScores, trained: Tensor, *, temperature: float) -> Tensor:
    """`softened_divergence` as far as the most likely tokens tell: (...) float32.

    original: of the same temperature. Not modified. trained: logits, (..., vocabulary).

    All other tokens count as one, so it is at most the true divergence. What is missing is the
    divergence between what the two models say of the others among themselves, times their
    probability: nothing is learnt of their order.
    """
    scores = _log_softmax(trained, temperature)
    chosen = scores.gather(-1, original.tokens)
    actual = torch.cat((chosen, _others(scores, original.tokens)), -1)
    return temperature**2 * relative_entropy(original.log_probabilities.float(), actual)


def unit_states(hidden: Tensor) -> Tensor:
    """Every token's state with a root mean square of 1, (..., d) float32.

    hidden: (..., d), any floating dtype. Not modified. A state of zeros stays one.

    What a block adds counts by how it turns the state: a few tokens have states that are hundreds
    of times longer than all others, and the next norm takes the length away anyhow.
    """
    wide = hidden.float()
    square = wide.square().mean(-1, keepdim=True)
    return wide * square.clamp(min=torch.finfo(torch.float32).tiny).rsqrt()


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.float()
    return torch.log_softmax(wide if temperature == 1 else wide / temperature, dim=-1)


def _others(scores: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of all tokens but these, (..., 1)."""
    left = scores.scatter(-1, tokens, float("-inf"))
    return left.logsumexp(-1, keepdim=True)
