"""Against methods.md A1 to A3 and float64 arithmetic written out by hand."""

from __future__ import annotations

from math import acos, pi, sqrt

import pytest
import torch

from compresso.errors import NumericalError
from compresso.kernels.similarity import (
    angular_distance,
    block_influence,
    pairwise_angular_distance,
    similarity,
)

X, Y = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])


def test_known_angles():
    assert block_influence(X, Y) == pytest.approx(1 - 1 / sqrt(2), abs=1e-7)
    assert similarity(X, Y) == pytest.approx(1 / sqrt(2), abs=1e-7)
    assert angular_distance(X, Y) == pytest.approx(0.25, abs=1e-12)
    assert angular_distance(X, torch.tensor([[0.0, 3.0]])) == 0.5
    assert angular_distance(X, -7 * X) == 1.0
    assert angular_distance(X, X) == 0.0
    assert block_influence(X, -7 * X) == 2.0


@pytest.mark.parametrize("factor", [1.0, 2.0, 0.1, 3e-5, 700.0])
def test_scaling_a_state_has_no_influence(factor):
    states = torch.randn(3, 50, 300, generator=torch.Generator().manual_seed(0))
    assert block_influence(states, factor * states) == 0.0
    assert angular_distance(states, factor * states) < 1e-7


def test_an_identity_block_is_exact():
    states = torch.randn(3, 50, 300, generator=torch.Generator().manual_seed(1))
    assert similarity(states, states) == 1.0
    assert angular_distance(states, states) == 0.0


def test_the_mean_is_over_tokens_not_of_the_mean_direction():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    y = torch.tensor([[[1.0, 1.0], [-5.0, 0.0]]])
    assert block_influence(x, y) == pytest.approx(1 - (1 / sqrt(2) - 1) / 2, abs=1e-7)
    assert angular_distance(x, y) == pytest.approx((0.25 + 1) / 2, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_massive_activations_do_not_overflow(dtype):
    x = torch.zeros(1, 64, dtype=dtype)
    x[0, 0], x[0, 1] = 60000, 300
    y = x.clone()
    y[0, 2] = 60000
    first, second = float(x[0, 0]), float(x[0, 1])
    square = first**2 + second**2
    expected = square / sqrt(square * (square + float(y[0, 2]) ** 2))
    assert similarity(x, y) == pytest.approx(expected, abs=1e-7)
    assert angular_distance(x, y) == pytest.approx(acos(expected) / pi, abs=1e-7)


def test_tiny_and_huge_tokens_keep_their_direction():
    assert similarity(1e-30 * X, 1e30 * Y) == pytest.approx(1 / sqrt(2), abs=1e-7)


def test_zero_tokens():
    zero = torch.zeros(1, 2)
    assert similarity(zero, zero) == 1.0
    assert similarity(zero, X) == 0.0
    assert angular_distance(X, zero) == 0.5


@pytest.mark.parametrize("score", [similarity, block_influence, angular_distance])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_refused(score, value):
    with pytest.raises(NumericalError, match="hidden states are not finite"):
        score(X, torch.tensor([[1.0, value]]))
    with pytest.raises(NumericalError, match="hidden states are not finite"):
        score(torch.zeros(1, 2), torch.tensor([[1.0, value]]))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="different shapes"):
        similarity(torch.ones(2, 3), torch.ones(1, 3))


def test_pairwise_distances_are_the_distances_of_pairs():
    states = torch.randn(5, 40, 16, generator=torch.Generator().manual_seed(2))
    states[3] = states[1]
    states[4, :7] = 0
    before = states.clone()
    distances = pairwise_angular_distance(states)
    assert torch.equal(states, before)
    assert distances.dtype == torch.float64
    expected = [[angular_distance(x, y) for y in states] for x in states]
    torch.testing.assert_close(
        distances, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7
    )
    assert distances[1, 3] < 1e-7


def test_pairwise_distances_refuse_what_is_not_finite():
    states = torch.ones(2, 3, 4)
    states[1, 2, 0] = float("nan")
    with pytest.raises(NumericalError, match="hidden states are not finite"):
        pairwise_angular_distance(states)
