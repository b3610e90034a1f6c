"""Against the formulas of the paper, the start, and gradients by finite differences."""

from __future__ import annotations

import pytest
import torch

from compresso.kernels.autoround import decode, latent, settle
from compresso.kernels.gptq import quantize as quantize_gptq
from compresso.kernels.grid import Grid, Packed, fit_grid, round_to_grid

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def matrix(rows=16, columns=128):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator)


def start(weight, *, bits, symmetric, group_size=32, scale_dtype=torch.bfloat16, search="minmax"):
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    grid = fit_grid(weight, **options, scale_dtype=scale_dtype, search=search)
    return round_to_grid(weight, grid)


def moves(found, size=0.5):
    """Offsets and factors as training could leave them."""
    generator = torch.Generator().manual_seed(1)
    offset = torch.rand(found.offset().shape, generator=generator) * 2 * size - size
    clip = 1 + size * (torch.rand(found.clip().shape, generator=generator) - 0.5)
    return offset, clip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unmoved_it_is_the_start(bits, symmetric, group_size, dtype):
    weight = matrix()
    weight[0], weight[1], weight[:, 5] = 0, 0.7, 0
    gram = torch.eye(128) + 0.3
    for packed in (
        start(weight, bits=bits, symmetric=symmetric, group_size=group_size, scale_dtype=dtype),
        quantize_gptq(
            weight,
            gram,
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            grid="mse",
            damping=0.01,
            act_order=True,
            scale_dtype=dtype,
        ),
    ):
        found = latent(weight, packed, symmetric=symmetric)
        same = settle(found, found.offset(), found.clip())
        assert torch.equal(same.codes, packed.codes)
        assert torch.equal(same.grid.scale, packed.grid.scale)
        assert torch.equal(same.grid.zero, packed.grid.zero)
        assert (same.grid.bits, same.grid.dtype) == (bits, dtype)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_formulas_of_the_paper(bits):
    weight = matrix()
    packed = start(weight, bits=bits, symmetric=False, scale_dtype=torch.float32)
    most, zero = 2**bits - 1, packed.grid.zero
    found = latent(weight, packed, symmetric=False)
    offset, clip = moves(found)
    clip = clip.clamp(max=1)
    low, high = -zero * packed.grid.scale, (most - zero) * packed.grid.scale
    scale = (high * clip[1] - low * clip[0]) / most
    moved_zero = torch.round(-low * clip[0] / scale).clamp(0, most)
    grouped = weight.view(*scale.shape, -1)
    inside = (grouped >= low[..., None]) & (grouped <= high[..., None])
    codes = grouped / scale[..., None] + offset.view_as(grouped) + moved_zero[..., None]
    codes = codes.round().clamp(0, most)
    result = settle(found, offset, clip)
    torch.testing.assert_close(result.grid.scale, scale)
    assert torch.equal(result.grid.zero, moved_zero)
    same = result.codes.view_as(grouped) == codes
    assert same[inside].float().mean() > 0.999  # halves can go either way


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_trained_is_what_is_stored(symmetric, dtype):
    weight = matrix()
    packed = start(weight, bits=3, symmetric=symmetric, scale_dtype=dtype, search="mse")
    found = latent(weight, packed, symmetric=symmetric)
    offset, clip = moves(found)
    stored = settle(found, offset, clip)
    trained = decode(found, offset, clip)
    assert torch.equal(trained.to(dtype).float(), stored.decode())
    scale, zero = stored.grid.scale, stored.grid.zero
    assert torch.equal(scale.to(dtype).float(), scale)
    assert torch.equal(zero.round(), zero)
    assert zero.min() >= 0 and zero.max() <= stored.grid.max_code
    if symmetric:
        assert torch.equal(zero, packed.grid.zero)


def test_offsets_move_no_code_by_more_than_one():
    weight = matrix()
    packed = start(weight, bits=4, symmetric=False)
    found = latent(weight, packed, symmetric=False)
    offset, _ = moves(found)
    moved = settle(found, offset, found.clip()).codes.int() - packed.codes.int()
    assert set(moved.unique().tolist()) == {-1, 0, 1}


def test_what_is_far_from_its_code_is_taken_from_the_nearest_end():
    grid = Grid(torch.tensor([[1.0]]), torch.tensor([[1.0]]), 2)
    weight = torch.tensor([[-9.0, -1.0, 0.2, 1.0, 2.3, 9.0]])
    packed = round_to_grid(weight, grid)
    assert packed.codes.tolist() == [[0, 0, 1, 2, 3, 3]]
    found = latent(weight, packed, symmetric=False)
    expected = torch.tensor([[-0.49, 0.0, 1.2, 2.0, 3.3, 3.49]])
    torch.testing.assert_close(found.position, expected)
    kept = latent(weight, Packed(torch.full_like(packed.codes, 2), grid), symmetric=False)
    assert (settle(kept, kept.offset(), kept.clip()).codes == 2).all()
    torch.testing.assert_close(kept.position, torch.tensor([[1.51, 1.51, 1.51, 2.0, 2.49, 2.49]]))


@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients(symmetric):
    weight = matrix(4, 32)
    packed = start(weight, bits=3, symmetric=symmetric, scale_dtype=torch.float32, search="mse")
    found = latent(weight, packed, symmetric=symmetric)
    offset, clip = found.offset().requires_grad_(), found.clip().requires_grad_()
    direction = matrix(4, 32).flip(0)
    (decode(found, offset, clip) * direction).sum().backward()
    # Rounding moves a decoded weight by a step per offset of one, in its range.
    codes = found.position
    inside = (codes.round() >= 0) & (codes.round() <= 7)
    expected = direction * packed.grid.scale * inside
    torch.testing.assert_close(offset.grad, expected)
    # With rounding held fixed, the range acts through the grid and the place of weights on it.
    rounding = (codes.round() - codes).clamp(-0.5, 0.5)
    if symmetric:
        reach = torch.where(inside, rounding, packed.codes - packed.grid.zero)
        exact = (direction * reach * packed.grid.scale).sum(1, keepdim=True)
        torch.testing.assert_close(clip.grad[0], exact, rtol=1e-4, atol=1e-4)
    else:
        assert (clip.grad != 0).all()


def test_arguments_are_unchanged():
    weight = matrix()
    packed = start(weight, bits=4, symmetric=False)
    found = latent(weight, packed, symmetric=False)
    offset, clip = moves(found)
    given = (weight, packed.codes, packed.grid.scale, packed.grid.zero, offset, clip)
    copies = [one.clone() for one in given]
    decode(found, offset, clip)
    settle(found, offset, clip)
    assert all(torch.equal(one, copy) for one, copy in zip(given, copies, strict=True))
