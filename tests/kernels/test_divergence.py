"""Against torch's losses in float64, and sampling errors against what repeated sampling shows."""

from __future__ import annotations

from math import exp, log, sqrt

import pytest
import torch
from torch.nn import functional

from compresso.errors import NumericalError
from compresso.kernels.divergence import (
    Estimate,
    mean,
    perplexity,
    proportion,
    token_scores,
)


def problem(vocabulary=500, spread=4.0):
    generator = torch.Generator().manual_seed(0)
    original = spread * torch.randn(3, 20, vocabulary, generator=generator)
    compressed = original + 0.3 * torch.randn(3, 20, vocabulary, generator=generator)
    targets = torch.randint(vocabulary, (3, 20), generator=generator)
    return original, compressed, targets


def test_against_torch_in_float64():
    original, compressed, targets = problem()
    before = original.clone(), compressed.clone()
    scores = token_scores(original, compressed, targets)
    assert torch.equal(original, before[0]) and torch.equal(compressed, before[1])
    expected, actual = (x.double().log_softmax(-1) for x in (original, compressed))
    divergence = functional.kl_div(actual, expected, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(scores.divergence.double(), divergence, rtol=1e-5, atol=1e-6)
    for logits, loss in ((original, scores.original), (compressed, scores.compressed)):
        reference = functional.cross_entropy(
            logits.double().flatten(0, 1), targets.flatten(), reduction="none"
        )
        torch.testing.assert_close(loss.double().flatten(), reference, rtol=1e-6, atol=1e-6)
    same = original.argmax(-1) == compressed.argmax(-1)
    assert torch.equal(scores.same_top, same) and 0 < int(same.sum()) < same.numel()


def test_the_divergence_is_from_the_original():
    likely, even = torch.tensor([[[log(3.0), 0.0]]]), torch.zeros(1, 1, 2)
    scores = token_scores(likely, even, torch.zeros(1, 1, dtype=torch.int64))
    assert float(scores.divergence) == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identical_models_do_not_diverge(dtype):
    original, _, targets = problem()
    original = original.to(dtype)
    scores = token_scores(original, original.clone(), targets)
    assert torch.equal(scores.divergence, torch.zeros(3, 20))
    assert bool(scores.same_top.all())


def test_bfloat16_logits_are_scored_in_float32():
    original, compressed, targets = (
        x.bfloat16() if x.is_floating_point() else x for x in problem()
    )
    scores = token_scores(original, compressed, targets)
    exact = token_scores(original.float(), compressed.float(), targets)
    assert torch.equal(scores.divergence, exact.divergence)
    assert scores.original.dtype == torch.float32


def test_impossible_tokens_add_nothing():
    original, compressed, targets = problem(vocabulary=10)
    reference = token_scores(original, compressed, targets)
    never = torch.full((3, 20, 2), -torch.inf)
    padded = token_scores(
        torch.cat([original, never], -1), torch.cat([compressed, never], -1), targets
    )
    torch.testing.assert_close(padded.divergence, reference.divergence)


def test_refused_logits():
    logits, targets = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
    broken = logits.clone()
    broken[0, 1, 2] = float("nan")
    with pytest.raises(NumericalError, match="logits are not numbers"):
        token_scores(logits, broken, targets)
    with pytest.raises(ValueError, match="different shapes"):
        token_scores(logits, logits[..., :2], targets)


def test_perplexity_is_exp_of_the_mean():
    original, _, targets = problem()
    windows = token_scores(original, original, targets).compressed.mean(-1)
    loss = functional.cross_entropy(original.double().flatten(0, 1), targets.flatten())
    assert perplexity(windows).value == pytest.approx(exp(float(loss)), rel=1e-6)


def test_standard_errors_are_the_spread_of_repeated_measurements():
    generator = torch.Generator().manual_seed(1)
    trials = 2.0 + 0.3 * torch.randn(4000, 50, generator=generator, dtype=torch.float64)
    for estimate in (mean, perplexity):
        results = [estimate(trial) for trial in trials]
        values = torch.tensor([result.value for result in results])
        errors = torch.tensor([result.error for result in results])
        assert float(errors.mean()) == pytest.approx(float(values.std()), rel=0.05)


def test_estimates_by_hand():
    assert mean(torch.tensor([1.0, 3.0])) == Estimate(2.0, 1.0)
    assert perplexity(torch.tensor([1.0, 3.0])) == Estimate(exp(2.0), exp(2.0))
    assert mean(torch.tensor([1.5])) == Estimate(1.5, None)
    assert perplexity(torch.tensor([0.0])) == Estimate(1.0, None)
    assert proportion(3, 4) == Estimate(0.75, sqrt(0.75 * 0.25 / 4))
    assert proportion(4, 4) == Estimate(1.0, 0.0)
