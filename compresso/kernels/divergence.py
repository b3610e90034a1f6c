"""How far a compressed model's predictions are from the original's, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, sqrt

import torch
from torch import Tensor

from compresso.errors import NumericalError


@dataclass(frozen=True)
class TokenScores:
    """What two models say about the same tokens; every field has the shape of the targets.

    original:   negative log-likelihood of the target under the original, float32, nats.
    compressed: the same under the compressed model.
    divergence: KL(original || compressed) over the vocabulary, float32, nats.
    same_top:   whether both models rate the same token highest, bool.
    """

    original: Tensor
    compressed: Tensor
    divergence: Tensor
    same_top: Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean of samples and its standard error; None from a single sample."""

    value: float
    error: float | None


def token_scores(original: Tensor, compressed: Tensor, targets: Tensor) -> TokenScores:
    """Compare the predictions of two models.

    original, compressed: logits, (..., vocabulary), any floating dtype. Not modified.
    targets:              (...) int64, the tokens that do come next.

    A token the original gives probability 0 adds nothing to the divergence. Needs about 20 bytes
    per logit: pass long texts in chunks.

    Raises NumericalError if the logits hold NaN.

    Source: perplexity as in Frantar et al., arXiv:2210.17323; divergence and same top token as
    llama.cpp's `perplexity --kl-divergence`.
    """
    if original.shape != compressed.shape:
        raise ValueError(
            f"logits of different shapes: {tuple(original.shape)} and {tuple(compressed.shape)}"
        )
    expected, actual = _log_probabilities(original), _log_probabilities(compressed)
    return TokenScores(
        original=_pick(expected, targets),
        compressed=_pick(actual, targets),
        divergence=relative_entropy(expected, actual),
        same_top=original.argmax(-1) == compressed.argmax(-1),
    )


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The negative log-likelihood of the targets, (...) float32, in nats.

    logits: (..., vocabulary), any floating dtype. targets: (...) int64. Neither is modified.

    Raises NumericalError if the logits hold NaN.
    """
    return _pick(_log_probabilities(logits), targets)


def divergence(original: Tensor, compressed: Tensor) -> Tensor:
    """KL(original || compressed) over the vocabulary, (...) float32, in nats.

    original, compressed: logits, (..., vocabulary), any floating dtype. Not modified.

    A token the original gives probability 0 adds nothing. Raises NumericalError if the logits
    hold NaN.
    """
    return relative_entropy(_log_probabilities(original), _log_probabilities(compressed))


def relative_entropy(expected: Tensor, actual: Tensor) -> Tensor:
    """KL(expected || actual) of log-probabilities over the last dimension, (...), in nats.

    What `expected` gives probability 0 adds nothing.
    """
    probability = expected.exp()
    return (probability * (expected - actual)).masked_fill(probability == 0, 0.0).sum(-1)


def mean(samples: Tensor) -> Estimate:
    """The mean of independent samples, and its standard error.

    samples: (count,) floating, such as one divergence per window.
    """
    samples = samples.double()
    count = samples.numel()
    error = float(samples.std()) / sqrt(count) if count > 1 else None
    return Estimate(float(samples.mean()), error)


def perplexity(window_means: Tensor) -> Estimate:
    """exp of the mean, its standard error by the delta method.

    window_means: (windows,) floating, the mean negative log-likelihood of every window, all of the
                  same length. Tokens of one window depend on each other; windows hardly do.

    Of the differences between two models' window means, it is the ratio of their perplexities; the
    error of that ratio is far smaller than the errors of the two, as the windows are the same.
    """
    exponent = mean(window_means)
    value = exp(exponent.value)
    return Estimate(value, None if exponent.error is None else value * exponent.error)


def proportion(matches: int, count: int) -> Estimate:
    """The share of matches among `count` trials, and its binomial standard error."""
    share = matches / count
    return Estimate(share, sqrt(share * (1 - share) / count))


def _log_probabilities(logits: Tensor) -> Tensor:
    scores = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    if bool(torch.isnan(scores).any()):
        raise NumericalError("the model's logits are not numbers (NaN)")
    return scores


def _pick(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
