"""Against Sylvester's matrix built another way, and what an orthonormal rotation keeps."""

from __future__ import annotations

import pytest
import torch

from compresso.kernels import hadamard
from compresso.kernels.hadamard import block_size, transform, transform_gram


def matrix(size):
    """Entry (i, j) is -1 to the number of bits that i and j share."""
    numbers = torch.arange(size)
    shared = numbers[:, None] & numbers
    parity = sum((shared >> bit) & 1 for bit in range(12)) % 2
    return (1.0 - 2.0 * parity.double()) / size**0.5


def values(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("block", [1, 2, 4, 8, 32, 64, 128, 512, 1024, 2048])
def test_runs_are_multiplied_by_the_matrix_of_sylvester(block):
    given = values(3, 2, 2048)
    expected = (given.view(-1, block) @ matrix(block)).view_as(given)
    torch.testing.assert_close(transform(given, block), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("block", [1, 16, 128, 1024])
def test_it_is_its_own_inverse_and_keeps_the_energy(block):
    given = values(5, 1024, dtype=torch.float32)
    found = transform(given, block)
    torch.testing.assert_close(transform(found, block), given)
    torch.testing.assert_close(
        found.view(-1, block).square().sum(1), given.view(-1, block).square().sum(1)
    )


def test_tiles_do_not_change_the_result(monkeypatch):
    given = values(7, 96)
    expected = transform(given, 32)
    monkeypatch.setattr(hadamard, "CPU_TILE", 64)
    torch.testing.assert_close(transform(given, 32), expected, rtol=1e-14, atol=1e-14)


def test_a_gram_becomes_that_of_transformed_inputs():
    inputs = values(200, 96)
    expected = transform(inputs, 32).T @ transform(inputs, 32)
    torch.testing.assert_close(transform_gram(inputs.T @ inputs, 32), expected)


def test_arguments_are_not_modified():
    given = values(96, 96)
    copy = given.clone()
    transform(given, 1)
    transform(given, 32)
    transform_gram(given, 32)
    assert torch.equal(given, copy)
    assert transform(given, 1).data_ptr() != given.data_ptr()


@pytest.mark.parametrize(
    "columns, most, expected",
    [(1024, 1024, 1024), (4096, 1024, 1024), (896, 1024, 128), (11008, 1024, 256), (27, 64, 1),
     (5632, 1024, 512), (512, 100, 64), (512, 1, 1)],
)  # fmt: skip
def test_the_largest_block_that_divides(columns, most, expected):
    assert block_size(columns, most) == expected
