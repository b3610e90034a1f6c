"""Against the formulas of methods.md D1, exhaustive search, and compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize

from compresso.kernels import grid as module
from compresso.kernels.grid import Grid, Packed, fit_grid, quantize, round_to_grid

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BOTH = pytest.mark.parametrize("symmetric", [True, False])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fit(weight, *, bits=2, group_size=64, symmetric=True, scale_dtype=torch.float32, **more):
    return fit_grid(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype,
        **more,
    )  # fmt: skip


def errors(weight, grid, importance=1.0):
    """Sum of squared errors of every group, in units of its largest weight, float64."""
    # Not through decode(), which rounds once more than the objective does.
    groups = (len(weight), grid.scale.shape[1], -1)
    codes = round_to_grid(weight, grid).codes.view(groups).double()
    decoded = (codes - grid.zero[..., None]) * grid.scale[..., None]
    weight = weight.view(groups).double()
    peak = weight.abs().amax(-1).clamp(min=1e-300)[..., None]
    importance = torch.as_tensor(importance).double().expand(weight[0].numel()).view(groups[1], -1)
    return (((decoded - weight) / peak).square() * importance).sum(-1)


def test_worked_example():
    weight = torch.tensor([[-1.0, 0.0, 1.0, 2.0]])
    grid = fit(weight, group_size=4, symmetric=False, search="minmax")
    assert (grid.scale.item(), grid.zero.item()) == (1.0, 1.0)
    assert torch.equal(round_to_grid(weight, grid).codes, torch.tensor([[0, 1, 2, 3]]).byte())
    assert torch.equal(round_to_grid(weight, grid).decode(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [8, 64, -1])
@BOTH
def test_minmax_is_the_published_formula(bits, group_size, symmetric):
    weight = normal(9, 128)
    weight[3] = weight[3].abs()
    weight[4] = -weight[4].abs()
    options = dict(bits=bits, group_size=group_size, symmetric=symmetric)
    packed = quantize(weight, grid="minmax", scale_dtype=torch.float32, **options)

    grouped = weight.view(9, -1, 128 if group_size == -1 else group_size)
    low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True)
    high = high.clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / (2**bits - 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    expected = scale * (
        torch.clamp(torch.round(grouped / scale) + zero, 0, 2**bits - 1) - zero
    )  # fmt: skip
    torch.testing.assert_close(packed.decode(), expected.view(9, 128), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4])
@BOTH
def test_search_is_near_the_exhaustive_optimum_and_never_worse_than_minmax(bits, symmetric):
    weight = normal(40, 256) * torch.logspace(-6, 3, 40)[:, None]
    weight[1, 7], weight[2, 70] = 1.0, -3.0  # outliers
    importance = normal(256, seed=1).abs()
    for factors in (None, importance):
        seen = 1.0 if factors is None else factors
        extremes = fit(weight, bits=bits, symmetric=symmetric, search="minmax")
        found = errors(
            weight, fit(weight, bits=bits, symmetric=symmetric, importance=factors), seen
        )
        assert (found <= errors(weight, extremes, seen) * (1 + 1e-5)).all()

        best = torch.full_like(found, torch.inf)
        for factor in torch.linspace(0.1, 1.3, 241):
            for sign, shift in ((1, 0), (-1, 0)) if symmetric else ((1, -1), (1, 0), (1, 1)):
                zero = (extremes.zero + shift).clamp(0, extremes.max_code)
                tried = Grid(extremes.scale * factor * sign, zero, bits)
                best = torch.minimum(best, errors(weight, tried, seen))
        assert (found / best).mean() < 1.01


def test_importance_moves_the_grid_to_the_columns_that_matter():
    weight = normal(20, 64)
    importance = torch.ones(64)
    importance[:8] = 1000.0
    plain, weighted = fit(weight), fit(weight, importance=importance)
    best, other = (errors(weight, grid, importance).sum() for grid in (weighted, plain))
    assert best < 0.6 * other


def test_a_negative_scale_is_used_where_it_fits_better():
    # Of -2, -1, 0, 1 times the scale, only the negative side reaches the largest weight.
    weight = torch.tensor([[2.0, 1.0, 0.0, -1.0] * 2, [-2.0, -1.0, 0.0, 1.0] * 2])
    grid = fit(weight, group_size=8)
    torch.testing.assert_close(grid.scale, torch.tensor([[-1.0], [1.0]]))
    assert torch.equal(round_to_grid(weight, Grid(torch.tensor([[-1.0], [1.0]]), grid.zero, 2))
                       .decode(), weight)  # fmt: skip


def test_two_signs_are_worth_the_stored_zeros_at_two_bits():
    weight = normal(200, 64)
    symmetric, asymmetric = (errors(weight, fit(weight, symmetric=s)).sum() for s in (True, False))
    assert symmetric < 1.02 * asymmetric


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [64, -1])
@BOTH
def test_decode_equals_compressed_tensors(dtype, bits, group_size, symmetric):
    weight = normal(24, 192)
    packed = quantize(
        weight, None, bits=bits, group_size=group_size, symmetric=symmetric, grid="mse",
        scale_dtype=dtype,
    )  # fmt: skip
    grid, offset = packed.grid, 2 ** (bits - 1)
    stored = grid.scale.to(dtype)
    assert torch.equal(stored.float(), grid.scale)
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    expected = dequantize(
        (packed.codes.int() - offset).to(torch.int8),
        stored,
        None if symmetric else (grid.zero.int() - offset).to(torch.int8),
        args,
    )
    assert expected.dtype is dtype
    assert torch.equal(packed.decode(), expected.float())
    assert torch.equal(packed.decode().to(dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", ["mse", "minmax"])
@BOTH
def test_groups_of_zeros_decode_to_zero(dtype, search, symmetric):
    weight = normal(6, 128)
    weight[2], weight[4, :64] = 0.0, 0.0
    grid = fit(weight, scale_dtype=dtype, search=search, symmetric=symmetric)
    decoded = round_to_grid(weight, grid).decode()
    assert (decoded[weight == 0] == 0).all()
    assert (grid.scale != 0).all()
    assert decoded[4, 64:].abs().max() > 0


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e-3, 1e12])
@BOTH
def test_magnitude_does_not_matter(magnitude, symmetric):
    weight = normal(8, 128)
    plain = fit(weight, symmetric=symmetric)
    scaled = fit(weight * magnitude, symmetric=symmetric)
    torch.testing.assert_close(errors(weight * magnitude, scaled), errors(weight, plain),
                               rtol=1e-3, atol=0)  # fmt: skip


@BOTH
def test_scales_that_float16_cannot_hold(symmetric):
    least = 2.0**-24
    weight = normal(5, 64)
    weight[0] *= 1e-9  # every scale would be 0
    weight[1] *= 1e-6  # few digits of the scale remain
    weight[2] *= 1e5  # the weights themselves are beyond float16
    grid = fit(weight, bits=4, scale_dtype=torch.float16, symmetric=symmetric)
    decoded = round_to_grid(weight, grid).decode()
    assert grid.scale.isfinite().all() and decoded.isfinite().all()
    assert (grid.scale.abs() >= least).all()
    assert (decoded[0] == 0).all()
    assert (decoded[1] - weight[1]).abs().max() < 0.5e-6
    assert (decoded[1] - weight[1]).norm() < 0.15 * weight[1].norm()
    assert (decoded[2].sign() == weight[2].sign())[weight[2].abs() > 2e4].all()


@BOTH
def test_tiles_do_not_show(monkeypatch, symmetric):
    weight = normal(150, 192)
    importance = normal(192, seed=1).abs()
    whole = fit(weight, symmetric=symmetric, importance=importance)
    monkeypatch.setattr(module, "CPU_TILE", 64 * 64)
    tiled = fit(weight, symmetric=symmetric, importance=importance)
    torch.testing.assert_close(errors(weight, tiled), errors(weight, whole), rtol=1e-4, atol=0)


@BOTH
def test_arguments_are_not_modified(symmetric):
    weight, importance = normal(8, 128), normal(128, seed=1).abs()
    copies = weight.clone(), importance.clone()
    grid = fit(weight, symmetric=symmetric, importance=importance)
    held = grid.scale.clone(), grid.zero.clone()
    packed = round_to_grid(weight, grid)
    codes = packed.codes.clone()
    packed.decode()
    assert torch.equal(weight, copies[0]) and torch.equal(importance, copies[1])
    assert torch.equal(grid.scale, held[0]) and torch.equal(grid.zero, held[1])
    assert torch.equal(packed.codes, codes)


def test_a_transposed_weight_is_read_in_its_own_order():
    weight = normal(128, 24).t()
    there, here = (quantize(w, bits=3, group_size=32, symmetric=True, grid="mse",
                            scale_dtype=torch.bfloat16)
                   for w in (weight, weight.contiguous()))  # fmt: skip
    assert torch.equal(there.codes, here.codes)
    assert torch.equal(there.decode(), here.decode())


def test_split_undoes_stacking():
    weight = normal(12, 64)
    packed = round_to_grid(weight, fit(weight, symmetric=False))
    first, second = packed.split([5, 7])
    assert isinstance(first, Packed)
    assert torch.equal(torch.cat((first.decode(), second.decode())), packed.decode())


def test_columns_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="100 columns do not divide into groups of 64"):
        fit(normal(2, 100))
