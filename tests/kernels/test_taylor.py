"""Against sums written out by hand, and a loss whose first-order change is known."""

from __future__ import annotations

import pytest
import torch

from compresso.errors import NumericalError
from compresso.kernels.taylor import magnitude_importance, taylor_importance

WEIGHT = torch.tensor([[1.0, -2.0], [0.5, 0.0]])
GRADIENT = torch.tensor([[3.0, 1.0], [-4.0, 7.0]])


def test_sums_written_out():
    assert taylor_importance(WEIGHT, GRADIENT) == 3 + 2 + 2 + 0
    assert magnitude_importance(WEIGHT) == 3.5


def test_a_loss_that_is_linear_in_one_weight_changes_by_its_importance():
    inputs = torch.tensor([2.0, 5.0])
    weight = torch.tensor([0.0, -3.0], requires_grad=True)
    loss = weight @ inputs
    loss.backward()
    change = loss.item() - (torch.zeros(2) @ inputs).item()
    assert taylor_importance(weight.detach(), weight.grad) == abs(change) == 15


def test_sums_of_many_small_terms_keep_their_digits():
    count = 3000
    weight = torch.full((count, count), 0.1, dtype=torch.bfloat16)
    one = weight[0, 0].item()
    assert magnitude_importance(weight) == pytest.approx(count**2 * one, rel=1e-12)
    gradient = torch.full((count, count), 0.25)
    assert taylor_importance(weight, gradient) == pytest.approx(count**2 * one / 4, rel=1e-12)


def test_arguments_stay():
    weight, gradient = WEIGHT.clone(), GRADIENT.clone()
    taylor_importance(weight, gradient)
    magnitude_importance(weight)
    assert torch.equal(weight, WEIGHT) and torch.equal(gradient, GRADIENT)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="another shape"):
        taylor_importance(WEIGHT, GRADIENT[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    bad = torch.tensor([[1.0, value]])
    with pytest.raises(NumericalError, match="the gradients of a linear are not finite"):
        taylor_importance(torch.ones(1, 2), bad)
    with pytest.raises(NumericalError, match="the weights of a linear are not finite"):
        magnitude_importance(bad)
