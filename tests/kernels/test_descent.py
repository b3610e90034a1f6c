"""Against direct evaluation of the sum that descent lowers."""

from __future__ import annotations

import gc
from itertools import product

import pytest
import torch

from compresso.kernels import sweep
from compresso.kernels.descent import descend
from compresso.kernels.gptq import factorize, round_gptq
from compresso.kernels.grid import Grid, Packed, fit_grid, round_to_grid


def problem(rows=24, columns=96, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = inputs + 0.3 * inputs @ mixing
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight.to(dtype), (inputs.T @ inputs / len(inputs)).to(dtype)


def start(weight, *, bits=2, group_size=32, symmetric=True, scale_dtype=torch.float32):
    grid = fit_grid(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype
    )
    return round_to_grid(weight, grid)


def losses(weight, packed, gram, damping=0.0):
    """The sum of every row, float64, from weights that are not rounded on decoding."""
    grid = packed.grid
    levels = packed.codes.view(len(weight), grid.scale.shape[1], -1) - grid.zero[..., None]
    change = weight.double() - (levels.double() * grid.scale[..., None]).flatten(1)
    gram = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(len(gram))
    return ((change @ gram) * change).sum(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("group_size", [8, 32, -1])
@pytest.mark.parametrize("bits, symmetric", [(2, True), (2, False), (3, True), (4, False)])
def test_no_pass_raises_the_sum_of_any_row(dtype, group_size, bits, symmetric):
    weight, gram = problem()
    packed = start(weight, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
    before = first = losses(weight, packed, gram, damping=0.01)
    for _ in range(4):
        packed = descend(weight, packed, gram, damping=0.01, passes=1)
        after = losses(weight, packed, gram, damping=0.01)
        assert (after <= before * (1 + 1e-5)).all()
        before = after
    assert before.sum() < 0.7 * first.sum()
    assert torch.equal(packed.grid.scale.to(dtype).float(), packed.grid.scale)


def test_the_end_is_a_minimum_of_every_code_and_scale():
    weight, gram = problem(rows=3, columns=16, dtype=torch.float64)
    packed = descend(weight, start(weight, group_size=8), gram, damping=0.0, passes=50)
    least = losses(weight, packed, gram)
    for row, column, code in product(range(3), range(16), range(4)):
        codes = packed.codes.clone()
        codes[row, column] = code
        assert (losses(weight, Packed(codes, packed.grid), gram) >= least * (1 - 1e-9)).all()
    for factor in (0.999, 1.001):
        for group in range(2):
            scale = packed.grid.scale.clone()
            scale[:, group] *= factor
            moved = Packed(packed.codes, Grid(scale, packed.grid.zero, 2))
            assert (losses(weight, moved, gram) >= least).all()


def test_passes_add_up_and_none_changes_nothing():
    weight, gram = problem(dtype=torch.float64)
    packed = start(weight, scale_dtype=torch.bfloat16)
    same = descend(weight, packed, gram, damping=0.01, passes=0)
    assert torch.equal(same.codes, packed.codes)
    assert torch.equal(same.grid.scale, packed.grid.scale)
    twice = descend(weight, packed, gram, damping=0.01, passes=1)
    twice = descend(weight, twice, gram, damping=0.01, passes=1)
    both = descend(weight, packed, gram, damping=0.01, passes=2)
    assert torch.equal(both.codes, twice.codes)
    assert torch.equal(both.grid.scale, twice.grid.scale)


@pytest.mark.parametrize("block", [1, 5, 64])
def test_block_size_and_parts_do_not_change_the_result(block, monkeypatch):
    weight, gram = problem(dtype=torch.float64)
    packed = start(weight)
    expected = descend(weight, packed, gram, damping=0.01, passes=2)
    monkeypatch.setattr(sweep, "CPU_WEIGHTS", 500)
    found = descend(weight, packed, gram, damping=0.01, passes=2, block=block)
    assert torch.equal(found.codes, expected.codes)
    torch.testing.assert_close(found.grid.scale, expected.grid.scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_columns_without_input_disturb_nothing(damping):
    weight, gram = problem(dtype=torch.float64)
    gram[[4, 70]] = 0
    gram[:, [4, 70]] = 0
    packed = start(weight)
    found = descend(weight, packed, gram, damping=damping, passes=2)
    if damping:
        nearest = round_to_grid(weight, found.grid)
        assert (found.codes != nearest.codes)[:, [4, 70]].float().mean() < 0.1
    else:
        assert torch.equal(found.codes[:, [4, 70]], packed.codes[:, [4, 70]])
    assert found.grid.scale.isfinite().all()
    assert losses(weight, found, gram).sum() < 0.7 * losses(weight, packed, gram).sum()


def test_a_gram_of_zeros_changes_nothing():
    weight = problem()[0]
    packed = start(weight)
    found = descend(weight, packed, torch.zeros(96, 96), damping=0.01, passes=1)
    assert torch.equal(found.codes, packed.codes)
    assert torch.equal(found.grid.scale, packed.grid.scale)


def test_arguments_are_not_modified():
    weight, gram = problem()
    packed = start(weight)
    tensors = (weight, gram, packed.codes, packed.grid.scale, packed.grid.zero)
    copies = [tensor.clone() for tensor in tensors]
    descend(weight, packed, gram, damping=0.01, passes=2)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_nothing_outlives_a_call():
    """A reference cycle would keep the scratch of every call until a collection: a block's size."""
    weight, gram = problem()
    packed = start(weight)
    gc.collect()
    before = {id(item) for item in gc.get_objects() if type(item) is torch.Tensor}
    gc.disable()
    try:
        descend(weight, packed, gram, damping=0.01, passes=1)
        round_gptq(weight, factorize(gram, damping=0.01), packed.grid)
        held = [item for item in gc.get_objects() if type(item) is torch.Tensor]
    finally:
        gc.enable()
    assert not [item.shape for item in held if id(item) not in before and item.ndim > 1]
