"""Low-rank approximations against the singular values that they leave out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from compresso.errors import NumericalError
from compresso.kernels.lowrank import (
    LowRank,
    balanced,
    correction_parameters,
    energies,
    iterated,
    rank_within,
    truncate,
)

SHAPES = [(12, 20), (20, 12), (16, 16)]


def random_matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def random_gram(columns, tokens=200, seed=1):
    """Of inputs some of whose columns are much larger than others, and correlated."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    inputs = mixed * torch.logspace(-1, 1, columns)
    return inputs.T @ inputs / tokens


def output_error(matrix, found, gram):
    change = (matrix - found.product()).double()
    return (change @ gram.double() * change).sum().item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [0, 1, 5, 11, 12])
def test_the_error_is_the_singular_values_left_out(shape, rank):
    matrix = random_matrix(*shape)
    found = truncate(matrix, rank)
    assert found.up.shape == (shape[0], rank) and found.down.shape == (rank, shape[1])
    dropped = torch.linalg.svdvals(matrix)[rank:].square().sum()
    error = (matrix - found.product()).square().sum()
    torch.testing.assert_close(error, dropped, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_and_more_is_the_matrix(shape, weighted):
    matrix = random_matrix(*shape)
    gram = random_gram(shape[1]) if weighted else None
    for rank in (min(shape), min(shape) + 3):
        found = truncate(matrix, rank, gram)
        assert found.up.shape == (shape[0], rank) and found.down.shape == (rank, shape[1])
        torch.testing.assert_close(found.product(), matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_weighting_by_the_gram_gives_the_least_output_error(shape, rank):
    matrix, gram = random_matrix(*shape), random_gram(shape[1])
    weighted, plain = truncate(matrix, rank, gram), truncate(matrix, rank)
    error = output_error(matrix, weighted, gram)
    root = torch.linalg.cholesky(gram.double())
    dropped = torch.linalg.svdvals(matrix.double() @ root)[rank:].square().sum().item()
    assert error == pytest.approx(dropped, rel=1e-3)
    assert error < 0.9 * output_error(matrix, plain, gram)


def test_white_inputs_weigh_nothing():
    matrix = random_matrix(12, 20)
    weighted = truncate(matrix, 5, 3.0 * torch.eye(20))
    torch.testing.assert_close(weighted.product(), truncate(matrix, 5).product())


def test_inputs_that_are_always_zero_do_no_harm():
    matrix, gram = random_matrix(12, 20), random_gram(20, tokens=9)  # fewer tokens than columns
    gram[7] = gram[:, 7] = 0
    found = truncate(matrix, 9, gram)
    assert output_error(matrix, found, gram) < 1e-4 * (matrix @ gram * matrix).sum()
    torch.testing.assert_close(
        truncate(matrix, 5, torch.zeros(20, 20)).product(), truncate(matrix, 5).product()
    )


def test_no_residual_needs_no_correction():
    for gram in (None, random_gram(20)):
        found = truncate(torch.zeros(12, 20), 4, gram)
        assert torch.equal(found.product(), torch.zeros(12, 20))


@pytest.mark.parametrize("weighted", [False, True])
def test_both_factors_are_as_long(weighted):
    matrix = 1e4 * random_matrix(12, 20)
    found = truncate(matrix, 6, random_gram(20) if weighted else None)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))


def test_nothing_is_changed():
    matrix, gram = random_matrix(12, 20), random_gram(20)
    before = matrix.clone(), gram.clone()
    truncate(matrix, 3, gram)
    assert torch.equal(matrix, before[0]) and torch.equal(gram, before[1])


def test_the_product_has_the_shape_of_the_matrix():
    assert LowRank(torch.ones(3, 2), torch.ones(2, 5)).product().tolist() == [[2.0] * 5] * 3


def test_what_is_not_finite_is_refused():
    with pytest.raises(NumericalError, match="not finite"):
        truncate(torch.tensor([[1.0, torch.nan]]), 1)
    with pytest.raises(NumericalError, match="gram of 2 columns is not positive definite"):
        truncate(torch.ones(3, 2), 1, torch.tensor([[1.0, 0.0], [0.0, -5.0]]))


def test_rank_within_a_budget():
    shapes = [(4, 6), (10, 6)]  # 26 a rank
    assert correction_parameters(shapes, rank=3) == 3 * (4 + 6 + 10 + 6)
    assert rank_within(shapes, parameters=25) == 0
    assert rank_within(shapes, parameters=26) == 1
    assert rank_within(shapes, parameters=26 * 7 + 25) == 7
    assert rank_within(shapes, parameters=-30) == 0


@pytest.mark.parametrize("rank", [1, 4, 6])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_without_full_rank_of_the_gram_it_is_the_truncated_inverse(rank, scale):
    """What EoRA takes: eigenvalues below the rounding of the largest count as zero."""
    matrix = random_matrix(24, 32)
    gram = scale * random_gram(32, tokens=8)
    values, vectors = torch.linalg.eigh(gram.double())
    live = values > values.max() * 32 * torch.finfo(torch.float32).eps
    assert int(live.sum()) == 8
    root = vectors[:, live] * values[live].sqrt()
    left, singular, right = torch.linalg.svd(matrix.double() @ root, full_matrices=False)
    inverse = vectors[:, live] / values[live].sqrt()
    expected = (left[:, :rank] * singular[:rank]) @ right[:rank] @ inverse.T
    found = truncate(matrix, rank, gram)
    least = output_error(matrix, LowRank(expected.float(), torch.eye(32)), gram)
    assert output_error(matrix, found, gram) == pytest.approx(least, rel=1e-3)
    assert least == pytest.approx(singular[rank:].square().sum().item(), rel=1e-3)
    # The inverse leaves what no token has reached; this takes off of that, too, what it can.
    assert (matrix - found.product()).norm() < (matrix - expected.float()).norm()


@pytest.mark.parametrize("weighted", [False, True])
def test_energies_are_what_every_rank_takes_off(weighted):
    matrix, gram = random_matrix(12, 20), random_gram(20) if weighted else None
    metric = torch.eye(20) if gram is None else gram
    found = energies(matrix, gram)
    errors = [output_error(matrix, truncate(matrix, rank, gram), metric) for rank in range(13)]
    taken = torch.tensor([one - other for one, other in pairwise(errors)])
    torch.testing.assert_close(found, taken.float(), rtol=1e-3, atol=1e-3 * errors[0])
    assert found.sum().item() == pytest.approx(errors[0], rel=1e-3)


def test_balancing_keeps_the_product():
    up, down = 1e3 * random_matrix(12, 4), 1e-3 * random_matrix(4, 20)
    up[:, 2], down[3] = 0, 0
    found = balanced(up, down)
    torch.testing.assert_close(found.product(), up @ down)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))


def decaying(rows, columns, seed=0):
    """With singular values of 1, 1/2, 1/3, ..."""
    left, _, right = torch.linalg.svd(random_matrix(rows, columns, seed), full_matrices=False)
    return (left / torch.arange(1, left.shape[1] + 1)) @ right


@pytest.mark.parametrize("shape", [(200, 120), (120, 200)])
def test_iterating_comes_to_nearly_the_same(shape):
    matrix = decaying(*shape)
    before = matrix.clone()
    found, basis = iterated(matrix, 8, None)
    least = (matrix - truncate(matrix, 8).product()).square().sum()
    assert 0.9999 * least < (matrix - found.product()).square().sum() < 1.001 * least
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))
    again, _ = iterated(matrix, 8, None)
    assert torch.equal(again.product(), found.product())
    other = matrix + 0.02 * decaying(*shape, seed=3)
    found, _ = iterated(other, 8, basis)
    least = (other - truncate(other, 8).product()).square().sum()
    assert (other - found.product()).square().sum() < 1.001 * least
    assert torch.equal(matrix, before)
