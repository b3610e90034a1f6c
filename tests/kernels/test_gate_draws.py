"""Against the formulas written out, finite differences and counted draws."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from compresso.kernels.gates import (
    blend,
    draw_noise,
    open_probability,
    sample_gates,
    scale,
    within_budget,
)

LOGITS = torch.tensor([-2.0, 0.0, 0.5, 3.0])
COSTS = [1.0, 4.0, 1.0, 2.0]


def draws(count, gates=4):
    return torch.rand(count, gates, generator=torch.Generator().manual_seed(0))


def test_one_gate_written_out():
    noise, logit = 0.3, 0.5
    relaxed = 1 / (1 + exp(-(log(noise) - log(1 - noise) + logit) * 1.5))
    gate = sample_gates(torch.tensor([logit]), torch.tensor([[noise]]))
    assert gate.item() == pytest.approx(relaxed * 1.2 - 0.1, rel=1e-6)


def test_the_chance_to_be_open_is_that_of_draws():
    gates = sample_gates(LOGITS, draws(200_000))
    assert torch.allclose(
        (gates > 0).double().mean(0), open_probability(LOGITS).double(), atol=4e-3
    )
    assert gates.min() == 0 and gates.max() == 1
    undecided = ((gates > 0) & (gates < 1)).double().mean(0)
    assert undecided.max() < 0.8 and undecided.min() > 0.1  # decided and undecided ones, always


def test_noise_is_uniform_and_comes_in_opposite_pairs():
    noise = draw_noise(5, 20_000, torch.Generator().manual_seed(0))
    assert noise.shape == (10, 20_000) and noise.min() > 0 and noise.max() < 1
    assert torch.equal(noise[5:], 1 - noise[:5])
    assert torch.equal(noise, draw_noise(5, 20_000, torch.Generator().manual_seed(0)))
    shares = torch.histc(noise[:5], bins=10, min=0, max=1) / noise[:5].numel()
    assert (shares - 0.1).abs().max() < 5e-3


def test_gates_differ_by_noise_and_follow_their_logits():
    noise = draws(5)
    assert sample_gates(LOGITS, noise).shape == noise.shape
    assert (sample_gates(LOGITS + 1, noise) >= sample_gates(LOGITS, noise)).all()
    opposite = sample_gates(torch.zeros(4), noise) + sample_gates(torch.zeros(4), 1 - noise)
    assert torch.allclose(opposite, torch.ones(5, 4), atol=1e-6)


@pytest.mark.parametrize("kept", [0.001, 0.3, 0.75, 0.999])
def test_the_budget_is_met_by_moving_all_logits_alike(kept):
    moved = within_budget(LOGITS.double(), COSTS, kept=kept)
    expected = sum(c * p for c, p in zip(COSTS, open_probability(moved).tolist(), strict=True))
    assert expected == pytest.approx(kept * sum(COSTS), rel=1e-9)
    assert torch.allclose(moved - moved[0], LOGITS.double() - LOGITS[0], atol=1e-12)


def test_far_apart_logits_meet_the_budget_too():
    moved = within_budget(torch.tensor([-80.0, 0.0, 90.0]), [1, 1, 2], kept=0.75)
    assert open_probability(moved).tolist() == pytest.approx([0, 1, 1], abs=1e-4)


def test_the_gradient_through_the_budget():
    logits = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda given: within_budget(given, COSTS, kept=0.6), logits, eps=1e-5, atol=1e-6
    )
    open_probability(within_budget(logits, COSTS, kept=0.6)).mul(
        torch.tensor(COSTS)
    ).sum().backward()
    assert logits.grad.abs().max() < 1e-12  # the cost that is kept cannot be changed


def test_the_gradient_of_gates():
    noise = draws(20).double().clamp(0.2, 0.8)
    logits = LOGITS.double().mul(0.1).requires_grad_()  # away from where a gate becomes 0 or 1
    assert torch.autograd.gradcheck(lambda given: sample_gates(given, noise), logits)


@pytest.mark.parametrize("kept", [0.0, 1.0, -0.5, 2.0])
def test_a_budget_of_nothing_or_all_is_refused(kept):
    with pytest.raises(ValueError, match="cannot keep a share of"):
        within_budget(LOGITS, COSTS, kept=kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_closed_and_open_are_exact(dtype):
    generator = torch.Generator().manual_seed(1)
    before, after = (torch.randn(3, 50, generator=generator).to(dtype) * 100 for _ in range(2))
    copies = before.clone(), after.clone()
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    assert (
        torch.equal(blend(before, after, one), after) and blend(before, after, one).dtype == dtype
    )
    assert torch.equal(blend(before, after, zero), before)
    assert torch.equal(scale(after, one), after) and scale(after, one).dtype == dtype
    assert not scale(after, zero).any()
    half = blend(before.float(), after.float(), torch.tensor(0.25))
    assert torch.allclose(half, 0.75 * before.float() + 0.25 * after.float(), atol=1e-4)
    assert torch.equal(before, copies[0]) and torch.equal(after, copies[1])


def test_arguments_stay():
    logits, noise = LOGITS.clone(), draws(3)
    kept = noise.clone()
    sample_gates(within_budget(logits, COSTS, kept=0.5), noise)
    assert torch.equal(logits, LOGITS) and torch.equal(noise, kept)
