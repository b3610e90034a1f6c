"""Codes and factors in turns: what must hold of every decomposition, exactly."""

from __future__ import annotations

import pytest
import torch

from compresso.errors import NumericalError
from compresso.kernels import grid
from compresso.kernels.decomposition import Fisher, decompose, quantize

SHAPES = [(24, 32), (32, 16)]
OPTIONS = {"group_size": 8, "symmetric": True, "grid": "mse", "scale_dtype": torch.float32}


def matrix(shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fisher(shape, seed=5):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.rand(size, generator=generator).pow(2) + 0.01 for size in shape)
    return Fisher(rows, columns)


def rtn(weight, bits=2, **changes):
    return grid.quantize(weight, bits=bits, **{**OPTIONS, **changes})


def run(weight, *, rank=4, turns=20, first="factors", dtype=torch.float32, bits=2, **options):
    return decompose(
        weight,
        lambda rest: rtn(rest, bits),
        rank=rank,
        turns=turns,
        first=first,
        dtype=dtype,
        **options,
    )


def squares(change, weights=None):
    scaled = change if weights is None else weights.rows[:, None] * change * weights.columns
    return scaled.double().square().sum().item()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("first", ["factors", "codes"])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_fall_until_it_stops_and_the_best_is_kept(shape, first, weighted):
    weight, weights = matrix(shape), fisher(shape) if weighted else None
    found = run(weight, first=first, fisher=weights)
    assert 2 <= len(found.errors) <= 20
    falling = found.errors[:-1]
    assert falling == sorted(falling, reverse=True)
    assert found.error <= min(found.errors) < found.errors[0]
    scaled = None if weights is None else weights.scaled()
    left = squares(weight - found.decode(), scaled) / squares(weight, scaled)
    assert found.error == pytest.approx(left, rel=1e-4)


def test_a_worse_turn_ends_it_and_is_not_kept():
    weight, bits = matrix((24, 32)), iter([3, 4, 2, 8])

    def worse_in_the_third(rest):
        return rtn(rest, next(bits))

    found = decompose(
        weight, worse_in_the_third, rank=2, turns=9, first="codes", dtype=torch.float32
    )
    assert len(found.errors) == 3 and found.codes.grid.bits == 4
    assert found.error == found.errors[1] < found.errors[0] < found.errors[2]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_leaves_nothing_after_one_turn(shape, weighted):
    """Whatever the codes are."""
    found = run(matrix(shape), rank=min(shape), turns=1, fisher=fisher(shape) if weighted else None)
    assert found.error < 1e-10
    assert found.factors.up.shape == (shape[0], min(shape))


@pytest.mark.parametrize("first", ["factors", "codes"])
def test_weights_that_are_all_the_same_weigh_nothing(first):
    weight = matrix((24, 32))
    alike = Fisher(torch.full((24,), 3e-7), torch.full((32,), 5.0))
    plain, weighted = run(weight, first=first), run(weight, first=first, fisher=alike)
    torch.testing.assert_close(weighted.decode(), plain.decode(), rtol=1e-4, atol=1e-4)
    assert weighted.errors == pytest.approx(plain.errors, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_turn_of_loftq_takes_off_the_largest_singular_values(shape):
    weight = matrix(shape)
    found = run(weight, rank=5, turns=1, first="codes")
    assert torch.equal(found.codes.codes, rtn(weight).codes)
    rest = weight - found.codes.decode()
    taken = squares(rest) - squares(weight - found.decode())
    values = torch.linalg.svdvals(rest.double())
    assert taken == pytest.approx(values[:5].square().sum().item(), rel=1e-4)


def test_one_turn_of_lq_lora_quantizes_what_the_largest_leave():
    weight = matrix((24, 32))
    left, values, right = torch.linalg.svd(weight)
    rest = weight - left[:, :5] * values[:5] @ right[:5]
    found = run(weight, rank=5, turns=1)
    torch.testing.assert_close(found.codes.decode(), rtn(rest).decode())


@pytest.mark.parametrize("first", ["factors", "codes"])
def test_what_matters_more_is_nearer(first):
    weight, weights = matrix((24, 32)), fisher((24, 32))
    plain, weighted = run(weight, first=first), run(weight, first=first, fisher=weights)
    assert squares(weight - weighted.decode(), weights) < 0.8 * squares(
        weight - plain.decode(), weights
    )
    assert squares(weight - plain.decode()) < squares(weight - weighted.decode())


def test_what_never_mattered_is_not_divided_by():
    weight = matrix((24, 32))
    weights = fisher((24, 32))
    weights.rows[3], weights.columns[7] = 0.0, 0.0
    found = run(weight, fisher=weights)
    assert bool(torch.isfinite(found.decode()).all())
    nothing = Fisher(torch.zeros(24), torch.zeros(32))
    assert run(weight, fisher=nothing).errors == pytest.approx(run(weight).errors, rel=1e-4)


@pytest.mark.parametrize("first", ["factors", "codes"])
def test_factors_are_exact_in_the_type_they_are_stored_in(first):
    weight = matrix((24, 32))
    found = run(weight, first=first, dtype=torch.bfloat16, fisher=fisher((24, 32)))
    for factor in (found.factors.up, found.factors.down):
        assert torch.equal(factor, factor.bfloat16().float())
    assert found.error < 1.05 * run(weight, first=first, fisher=fisher((24, 32))).error


def test_the_method_is_the_decomposition_with_a_uniform_grid():
    weight, weights = matrix((24, 32)), fisher((24, 32))
    before = weight.clone()
    expected = run(weight, bits=3, fisher=weights)
    found = quantize(weight, None, bits=3, rank=4, turns=20, importance=weights, **OPTIONS)
    assert torch.equal(found.codes.codes, expected.codes.codes)
    assert torch.equal(found.decode(), expected.decode())
    assert torch.equal(weight, before)


def test_what_is_not_finite_is_refused():
    with pytest.raises(NumericalError, match="not finite"):
        run(torch.full((24, 32), torch.inf))


def test_the_loss_of_a_change_is_by_the_whole_matrix_where_that_is_a_product():
    generator = torch.Generator().manual_seed(2)
    whole = torch.rand(24, 1, generator=generator) * torch.rand(1, 32, generator=generator)
    weights = Fisher(whole.mean(1).sqrt(), whole.mean(0).sqrt())
    change = matrix((24, 32))
    expected = (whole * change.square()).sum().item()
    assert weights.loss(change) == pytest.approx(expected, rel=1e-4)
    assert Fisher(torch.zeros(24), torch.zeros(32)).loss(change) == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("first", ["factors", "codes"])
def test_large_matrices_come_to_the_same_as_small_ones(first, weighted, monkeypatch):
    """For which the nearest matrix of low rank is only iterated."""
    left, right = matrix((128, 12)), matrix((12, 96), seed=1)
    weight = left @ right + matrix((128, 96), seed=2)
    options = {"first": first, "fisher": fisher((128, 96)) if weighted else None}
    found = run(weight, turns=6, **options)
    monkeypatch.setattr("compresso.kernels.decomposition.OVERSAMPLING", 1000)
    exact = run(weight, turns=6, **options)
    assert found.errors == pytest.approx(exact.errors, rel=1e-2)
    assert found.error == pytest.approx(exact.error, rel=1e-2)
