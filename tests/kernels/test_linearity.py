"""Against toys whose coefficients are known."""

from __future__ import annotations

import pytest
import torch

from compresso.kernels.linearity import (
    LEAST_SLOPE,
    by_importance,
    fit_line,
    noise_levels,
    with_noise,
    zd,
)


def test_levels_are_equally_spaced_up_to_a_three_bit_grid():
    levels = noise_levels()
    assert len(levels) == 15 and levels[-1] == pytest.approx(0.0345)
    steps = [b - a for a, b in zip([0, *levels], levels, strict=False)]
    assert steps == pytest.approx([0.0345 / 15] * 15)


def test_noise_has_the_energy_asked_for_and_is_seeded():
    weight = 3 * torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    kept = weight.clone()
    noisy = with_noise(weight, 0.02, torch.Generator().manual_seed(5))
    assert float((noisy - weight).square().sum() / weight.square().sum()) == pytest.approx(
        0.02, rel=0.02
    )
    assert torch.equal(noisy, with_noise(weight, 0.02, torch.Generator().manual_seed(5)))
    assert not torch.equal(noisy, with_noise(weight, 0.02, torch.Generator().manual_seed(6)))
    assert torch.equal(weight, kept)
    assert with_noise(weight.bfloat16(), 0.02, torch.Generator()).dtype == torch.float32


def test_a_quadratic_toy_gives_its_coefficients_back():
    """Loss = sum over parts of a |dW|^2 / |W|^2: noise recovers every a."""
    generator = torch.Generator().manual_seed(0)
    for coefficient in (10.0, 0.3):
        weight = torch.randn(100, 100, generator=generator)
        losses = []
        for error in noise_levels():
            change = with_noise(weight, error, generator) - weight
            losses.append(float(coefficient * change.square().sum() / weight.square().sum()))
        line = fit_line(noise_levels(), losses)
        assert line.slope == pytest.approx(coefficient, rel=0.02)
        assert line.fit > 0.999


def test_a_line_is_met_exactly_and_goes_through_the_origin():
    errors = [0.01, 0.02, 0.04]
    line = fit_line(errors, [0.5 * error for error in errors])
    assert line.slope == pytest.approx(0.5, rel=1e-12)
    assert line.fit == pytest.approx(1.0)
    # An intercept is not fitted: sum(d t) / sum(t^2) = 0.07 / 0.0021.
    lifted = fit_line(errors, [1.0, 1.0, 1.0])
    assert lifted.slope == pytest.approx(0.07 / 0.0021)
    assert lifted.fit == pytest.approx(
        1 - sum((1 - 0.07 / 0.0021 * error) ** 2 for error in errors) / 3
    )


def test_a_negative_slope_is_noise():
    assert fit_line([0.01, 0.02], [-1e-6, -2e-6]).slope == LEAST_SLOPE
    assert fit_line([0.01, 0.02], [0.0, 0.0]).fit == 1.0


def test_zd_of_one_large_weight():
    assert zd([torch.tensor([0.0, 0.0, 0.0, 4.0])]) == 0.25
    assert zd([torch.tensor([0.0, 0.0]), torch.tensor([[0.0, 4.0]])]) == 0.25
    assert zd([torch.ones(3, 3)]) == 0.0


def test_ends_come_first():
    assert by_importance([0.1, 0.5, 0.9, 0.5, 0.2]) == [0, 4, 2, 1, 3]
    assert by_importance([0.3]) == [0]
