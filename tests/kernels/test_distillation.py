"""Distances of predictions and states: against dense references in float64."""

import pytest
import torch

from compresso.kernels.distillation import (
    softened_divergence,
    top_divergence,
    top_scores,
    unit_states,
)


def logits(seed, shape=(3, 5, 40)):
    return 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(original, trained, temperature):
    expected = (original.double() / temperature).softmax(-1)
    actual = (trained.double() / temperature).softmax(-1)
    return temperature**2 * (expected * (expected / actual).log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_its_gradient_are_the_formula_s(temperature):
    original, trained = logits(0), logits(1).requires_grad_()
    found = softened_divergence(original, trained, temperature=temperature)
    assert torch.allclose(found.double(), dense(original, trained, temperature), rtol=1e-5)
    found.sum().backward()
    # d/dz t^2 KL(p || softmax(z / t)) = t (softmax(z / t) - p)
    actual, expected = (one.double() / temperature for one in (trained.detach(), original))
    slope = temperature * (actual.softmax(-1) - expected.softmax(-1))
    assert torch.allclose(trained.grad.double(), slope, atol=1e-5)


def test_nothing_is_lost_of_the_same():
    same = logits(0).bfloat16()
    assert softened_divergence(same, same.clone(), temperature=2.0).count_nonzero() == 0


def test_impossible_tokens_add_nothing():
    original = logits(0)
    original[..., 7] = float("-inf")
    found = softened_divergence(original, logits(1), temperature=1.0)
    rest = [index for index in range(40) if index != 7]
    trained = logits(1).double().log_softmax(-1)[..., rest]
    expected = original.double().log_softmax(-1)[..., rest]
    assert torch.allclose(found.double(), (expected.exp() * (expected - trained)).sum(-1))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_scores_tell_the_divergence_but_for_the_others(temperature):
    original, trained = logits(0), logits(1)
    whole = dense(original, trained, temperature)
    last = torch.zeros_like(whole)
    for count in (1, 4, 16, 39):
        top = top_scores(original, count, temperature=temperature)
        assert top.tokens.shape == (3, 5, count)
        assert torch.allclose(top.log_probabilities.exp().sum(-1), torch.ones(3, 5))
        found = top_divergence(top, trained, temperature=temperature).double()
        # What is missing: the divergence among the others, times their probability.
        expected = (original.double() / temperature).softmax(-1).scatter(-1, top.tokens, 0.0)
        actual = (trained.double() / temperature).softmax(-1).scatter(-1, top.tokens, 0.0)
        rest = expected.sum(-1, keepdim=True)
        ratio = (expected / rest) / (actual / actual.sum(-1, keepdim=True))
        missing = torch.where(expected > 0, expected * ratio.log(), 0.0).sum(-1)
        assert torch.allclose(found + temperature**2 * missing, whole, rtol=1e-4, atol=1e-5)
        assert bool((found >= last - 1e-5).all())
        last = found
    assert torch.allclose(last, whole, rtol=1e-4, atol=1e-5)  # one other alone: nothing is missing


def test_top_divergence_has_the_gradient_of_merged_tokens():
    original, trained = logits(0), logits(1).requires_grad_()
    top = top_scores(original, 5, temperature=1.0)
    top_divergence(top, trained, temperature=1.0).sum().backward()
    free = trained.detach().double().requires_grad_()
    probability = free.softmax(-1)
    kept = probability.gather(-1, top.tokens)
    merged = torch.cat((kept, 1 - kept.sum(-1, keepdim=True)), -1)
    (top.log_probabilities.double().exp() * -merged.log()).sum().backward()
    assert torch.allclose(trained.grad.double(), free.grad, atol=1e-5)


def test_more_top_tokens_than_there_are():
    top = top_scores(logits(0), 100, temperature=1.0)
    assert top.tokens.shape[-1] == 39


def test_states_are_scaled_by_token():
    states = logits(0) * torch.logspace(-3, 3, 5)[:, None]
    found = unit_states(states.bfloat16())
    assert found.dtype == torch.float32
    assert torch.allclose(found.square().mean(-1), torch.ones(3, 5), atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(found, states.bfloat16().float(), dim=-1)
    assert torch.allclose(cosine, torch.ones(3, 5))
    assert unit_states(torch.zeros(2, 4)).count_nonzero() == 0
