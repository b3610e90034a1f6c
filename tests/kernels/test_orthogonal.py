"""Rotations are orthogonal, and as flat as a Hadamard matrix where there is one."""

import pytest
import torch

from compresso.kernels.orthogonal import random_rotation


def matrix(size, seed=0):
    rotation = random_rotation(size, torch.Generator().manual_seed(seed))
    assert rotation.size == size
    return rotation.apply(torch.eye(size, dtype=torch.float64))


# 96 = 12 * 8 and 640 = 20 * 32 by Paley's first construction, 224 = 28 * 8 and 576 = 36 * 16 by his
# second; 24 = 12 * 2, 736 = 23 * 32: of 92 he has none, and of 368 there is not enough.
FLAT = (1, 2, 64, 12, 24, 96, 640, 224, 576)
UNEVEN = (3, 15, 46, 736)


@pytest.mark.parametrize("size", FLAT + UNEVEN)
def test_it_is_orthogonal(size):
    found = matrix(size)
    identity = torch.eye(size, dtype=torch.float64)
    assert (found @ found.T - identity).abs().max() < 1e-12


@pytest.mark.parametrize("size", FLAT)
def test_all_entries_are_of_one_size(size):
    assert (matrix(size).abs() - size**-0.5).abs().max() < 1e-12


@pytest.mark.parametrize("size", UNEVEN)
def test_other_sizes_are_mixed_all_over(size):
    found = matrix(size).abs()
    assert found.min() > 0 and (size < 10 or found.max() < 0.9)


def test_rows_are_rotated_one_by_one_and_not_modified():
    rotation = random_rotation(24, torch.Generator().manual_seed(1))
    rows = torch.randn(2, 3, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    kept = rows.clone()
    expected = rows @ matrix(24, seed=1)
    assert (rotation.apply(rows) - expected).abs().max() < 1e-12
    assert (rotation.apply(rows.movedim(0, 1)) - expected.movedim(0, 1)).abs().max() < 1e-12
    assert torch.equal(rows, kept)


@pytest.mark.parametrize("size", [15, 64])
def test_the_generator_decides(size):
    assert torch.equal(matrix(size, seed=3), matrix(size, seed=3))
    assert not torch.equal(matrix(size, seed=3), matrix(size, seed=4))
