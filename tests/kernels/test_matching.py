"""Against least squares by brute force, and what moving weights promises."""

from __future__ import annotations

import pytest
import torch

from compresso.errors import NumericalError
from compresso.kernels.matching import moved

ROWS, COLUMNS, TOKENS = 5, 12, 400


def problem(*, seed=0, dtype=torch.float64):
    """Weights, inputs that others' errors changed, and outputs of the unchanged ones."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=dtype)
    inputs = torch.randn(TOKENS, COLUMNS, generator=generator, dtype=dtype)
    inputs = inputs @ torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=dtype)
    error = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=dtype)
    changed = inputs + 0.2 * inputs @ error
    changed += 0.3 * torch.randn(TOKENS, COLUMNS, generator=generator, dtype=dtype)
    lost = 0.2 * changed[:, :ROWS] + torch.randn(TOKENS, ROWS, generator=generator, dtype=dtype)
    return weight, changed, inputs @ weight.T + lost


def statistics(weight, changed, wanted):
    missing = (wanted - changed @ weight.T).T @ changed / len(changed)
    return missing, changed.T @ changed / len(changed)


def error(weight, changed, wanted):
    return (changed @ weight.T - wanted).square().sum().item()


def test_all_the_way_is_least_squares():
    weight, changed, wanted = problem()
    found = moved(weight, *statistics(weight, changed, wanted), amount=1, damping=1e-13)
    expected = torch.linalg.lstsq(changed, wanted).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert error(found, changed, wanted) < 0.7 * error(weight, changed, wanted)


def test_damping_is_ridge_regression_towards_the_weights():
    weight, changed, wanted = problem(seed=1)
    missing, gram = statistics(weight, changed, wanted)
    ridge = 0.3 * gram.diagonal().mean()
    rows = torch.cat([changed / TOKENS**0.5, ridge.sqrt() * torch.eye(COLUMNS).double()])
    targets = torch.cat([(wanted - changed @ weight.T) / TOKENS**0.5, torch.zeros(COLUMNS, ROWS)])
    expected = weight + torch.linalg.lstsq(rows, targets).solution.T
    found = moved(weight, missing, gram, amount=1, damping=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_amounts_are_on_the_line_to_the_optimum_and_every_step_helps():
    weight, changed, wanted = problem()
    found = [
        moved(weight, *statistics(weight, changed, wanted), amount=amount, damping=0.1)
        for amount in (0, 0.5, 1)
    ]
    torch.testing.assert_close(found[1], (found[0] + found[2]) / 2)
    errors = [error(one, changed, wanted) for one in found]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("amount", [0.5, 1])
def test_where_nothing_is_missing_nothing_moves(amount):
    weight, changed, wanted = problem(dtype=torch.float32)
    _, gram = statistics(weight, changed, wanted)
    found = moved(weight, torch.zeros_like(weight), gram, amount=amount, damping=0.1)
    assert torch.equal(found, weight)


def test_columns_without_input_stay_and_move_no_other():
    weight, changed, wanted = problem()
    changed[:, 3] = 0
    live = [column for column in range(COLUMNS) if column != 3]
    found = moved(weight, *statistics(weight, changed, wanted), amount=1, damping=0.1)
    assert torch.equal(found[:, 3], weight[:, 3])
    without = weight[:, live], changed[:, live]
    expected = moved(without[0], *statistics(*without, wanted), amount=1, damping=0.1)
    torch.testing.assert_close(found[:, live], expected)


def test_inputs_that_are_always_zero_move_nothing():
    weight = torch.ones(2, 3)
    found = moved(weight, torch.zeros(2, 3), torch.zeros(3, 3), amount=1, damping=0.1)
    assert torch.equal(found, weight)


def test_arguments_stay_as_they_are():
    given = statistics(*problem(dtype=torch.float32))
    weight, _, _ = problem(dtype=torch.float32)
    before = [tensor.clone() for tensor in (weight, *given)]
    moved(weight, *given, amount=0.5, damping=0.1)
    assert all(map(torch.equal, before, (weight, *given)))


def test_a_gram_that_is_not_positive_definite_is_refused():
    gram = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(NumericalError, match="gram of 2 columns is not positive def") as bad:
        moved(torch.ones(1, 2), torch.ones(1, 2), gram, amount=1, damping=0.1)
    assert "`--match 0`" in bad.value.hint
