"""Against methods.md D2, a textbook version in float64, and what the method promises."""

from __future__ import annotations

import pytest
import torch

from compresso.errors import NumericalError
from compresso.kernels.gptq import factorize, quantize, relative_error, round_gptq
from compresso.kernels.grid import Grid, fit_grid, round_to_grid

INTEGERS = Grid(torch.ones(1, 1), torch.full((1, 1), 128.0), 8)
SETTINGS = dict(
    bits=3, group_size=32, symmetric=True, grid="mse", damping=0.01, act_order=True,
    scale_dtype=torch.bfloat16,
)  # fmt: skip


def problem(rows=48, columns=128, *, seed=0, dtype=torch.float64):
    """A weight and the gram of correlated inputs with a few loud columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    loudness = torch.rand(columns, generator=generator, dtype=torch.float64) ** 4 * 10 + 0.1
    inputs = torch.randn(2048, columns, generator=generator, dtype=torch.float64)
    inputs = (inputs + 0.3 * inputs @ mixing) * loudness
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight.to(dtype), (inputs.T @ inputs / len(inputs)).to(dtype)


def fit(weight, *, bits=3, group_size=32, symmetric=True):
    return fit_grid(
        weight, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=torch.float32
    )


def loss(weight, packed, gram):
    change = (weight - packed.decode()).double()
    return ((change @ gram.double()) * change).sum().item()


def textbook(weight, gram, grid, *, damping, order):
    """Algorithm 1 of the paper, column by column: codes."""
    columns = len(gram)
    size = columns // grid.scale.shape[1]
    damped = gram[order][:, order] + damping * gram.diagonal().mean() * torch.eye(columns)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    pending, codes = weight[:, order].clone(), torch.empty(weight.shape, dtype=torch.uint8)
    for column, place in enumerate(order.tolist()):
        scale, zero = grid.scale[:, place // size], grid.zero[:, place // size]
        code = torch.clamp(torch.round(pending[:, column] / scale) + zero, 0, grid.max_code)
        codes[:, place] = code.to(torch.uint8)
        error = (pending[:, column] - scale * (code - zero)) / upper[column, column]
        pending[:, column:] -= torch.outer(error, upper[column, column:])
    return codes


def test_worked_example():
    weight, gram = torch.tensor([[0.6, 0.6]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    packed = round_gptq(weight, factorize(gram, damping=0), INTEGERS)
    assert torch.equal(packed.decode(), torch.tensor([[1.0, 0.0]]))
    assert loss(weight, packed, gram) == pytest.approx(0.56, abs=1e-6)
    assert loss(weight, round_to_grid(weight, INTEGERS), gram) == pytest.approx(0.96, abs=1e-6)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_those_of_the_textbook(act_order, symmetric, bits):
    weight, gram = problem()
    grid = fit(weight, bits=bits, symmetric=symmetric)
    order = torch.arange(128)
    if act_order:
        order = gram.diagonal().argsort(descending=True)
        assert not torch.equal(order, torch.arange(128))
    factor = factorize(gram, damping=0.01, act_order=act_order)
    assert torch.equal(factor.order, order)
    expected = textbook(weight, gram, grid, damping=0.01, order=order)
    assert torch.equal(round_gptq(weight, factor, grid).codes, expected)


@pytest.mark.parametrize("block", [1, 7, 16, 64, 128])
def test_block_size_does_not_change_the_codes(block):
    weight, gram = problem()
    factor, grid = factorize(gram, damping=0.01), fit(weight)
    expected = round_gptq(weight, factor, grid)
    assert torch.equal(round_gptq(weight, factor, grid, block=block).codes, expected.codes)


def test_a_diagonal_gram_rounds_to_nearest():
    weight = problem(dtype=torch.float32)[0]
    gram = torch.diag(torch.rand(128, generator=torch.Generator().manual_seed(1)) + 0.1)
    for symmetric in (True, False):
        grid = fit(weight, symmetric=symmetric)
        packed = round_gptq(weight, factorize(gram, damping=0.01), grid)
        assert torch.equal(packed.codes, round_to_grid(weight, grid).codes)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_losses_of_the_columns_add_up(dtype, tolerance):
    weight, gram = problem(dtype=dtype)
    factor = factorize(gram, damping=0.01)
    packed = round_gptq(weight, factor, fit(weight))
    change = (weight - packed.decode())[:, factor.order]
    losses = factor.pivots * (change + change @ factor.feedback.T).square()
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(128, dtype=dtype)
    assert losses.sum().item() == pytest.approx(loss(weight, packed, damped), rel=tolerance)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [16, 64])
def test_a_fifth_better_than_nearest(bits, group_size):
    weight, gram = problem(dtype=torch.float32)
    grid = fit(weight, bits=bits, group_size=group_size)
    packed = round_gptq(weight, factorize(gram, damping=0.01), grid)
    assert loss(weight, packed, gram) < 0.8 * loss(weight, round_to_grid(weight, grid), gram)


def test_columns_without_input_round_to_nearest_and_disturb_nothing():
    weight, gram = problem()
    dead = torch.zeros(128, dtype=torch.bool)
    dead[[3, 40, 41, 127]] = True
    gram[dead] = 0
    gram[:, dead] = 0
    grid = fit(weight)
    for act_order in (True, False):
        packed = round_gptq(weight, factorize(gram, damping=0.01, act_order=act_order), grid)
        nearest = round_to_grid(weight, grid)
        assert torch.equal(packed.codes[:, dead], nearest.codes[:, dead])

        moved = weight.clone()
        moved[:, dead] = 100.0
        again = round_gptq(moved, factorize(gram, damping=0.01, act_order=act_order), grid)
        assert torch.equal(again.codes[:, ~dead], packed.codes[:, ~dead])
        assert not torch.equal(packed.codes[:, ~dead], nearest.codes[:, ~dead])


def test_a_gram_of_zeros_rounds_to_nearest():
    weight = problem(dtype=torch.float32)[0]
    grid = fit(weight)
    packed = round_gptq(weight, factorize(torch.zeros(128, 128), damping=0.01), grid)
    assert torch.equal(packed.codes, round_to_grid(weight, grid).codes)


@pytest.mark.parametrize("value", [-100.0, float("nan")])
def test_a_gram_that_is_not_positive_definite_is_refused(value):
    gram = problem(dtype=torch.float32)[1]
    gram[5, 5] = value
    with pytest.raises(NumericalError, match=r"128 columns is not positive definite at damping"):
        factorize(gram, damping=0.01)


def test_float64_is_used_where_float32_fails():
    # R R^T has whole entries and known pivots, but is so close to singular that float32 fails at
    # many multiples of it; at which ones depends on the machine's LAPACK.
    upper = torch.eye(18, dtype=torch.float64) - torch.ones(18, 18).triu(1)
    grams = {pivot: (pivot * upper @ upper.T).float() for pivot in (3, 5, 6, 7, 10, 11, 13)}
    failing = [p for p, g in grams.items() if torch.linalg.cholesky_ex(g.flip(0, 1)).info]
    assert failing
    for pivot in failing:
        factor = factorize(grams[pivot], damping=0, act_order=False)
        assert factor.feedback.dtype is torch.float32
        torch.testing.assert_close(factor.pivots, torch.full((18,), float(pivot)))
        expected = -torch.ones(18, 18).tril(-1)
        torch.testing.assert_close(factor.feedback, expected, rtol=1e-4, atol=1e-4)


def test_order_is_kept_where_all_columns_are_alike():
    weight, gram = problem()
    loudness = gram.diagonal().sqrt()
    gram = gram / torch.outer(loudness, loudness)
    gram.diagonal().fill_(1.0)
    grid = fit(weight)
    codes = [
        round_gptq(weight, factorize(gram, damping=0.01, act_order=act_order), grid).codes
        for act_order in (True, False)
    ]
    assert torch.equal(*codes)


def test_stacked_rows_get_the_codes_they_get_alone():
    weight, gram = problem(rows=60)
    whole = quantize(weight, gram, **SETTINGS)
    sizes = [1, 32, 27]
    for part, packed in zip(weight.split(sizes), whole.split(sizes), strict=True):
        alone = quantize(part, gram, **SETTINGS)
        assert torch.equal(alone.codes, packed.codes)
        assert torch.equal(alone.grid.scale, packed.grid.scale)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_quantize_beats_its_steps(bits, symmetric, group_size):
    weight, gram = problem(dtype=torch.float32)
    settings = SETTINGS | dict(bits=bits, symmetric=symmetric, group_size=group_size)
    plain = quantize(weight, gram, **settings, refine=0)
    refined = quantize(weight, gram, **settings)
    grid = fit(weight, bits=bits, symmetric=symmetric, group_size=group_size)
    nearest = relative_error(weight, round_to_grid(weight, grid).decode(), gram)
    assert relative_error(weight, plain.decode(), gram) < 0.8 * nearest
    assert loss(weight, refined, gram) < (0.97 if bits == 2 else 0.99) * loss(weight, plain, gram)
    assert torch.equal(refined.grid.scale.bfloat16().float(), refined.grid.scale)
    assert refined.codes.max() <= refined.grid.max_code


def test_minmax_reaches_the_grid():
    weight, gram = problem(dtype=torch.float32)
    packed = quantize(weight, gram, **SETTINGS | dict(grid="minmax"), refine=0)
    peak = weight.view(48, -1, 32).abs().amax(-1)
    torch.testing.assert_close(packed.grid.scale, peak * 2 / 7, rtol=2**-8, atol=0)


def test_arguments_are_not_modified():
    weight, gram = problem(dtype=torch.float32)
    copies = weight.clone(), gram.clone()
    grid, factor = fit(weight), factorize(gram, damping=0.01)
    held = [tensor.clone() for tensor in (grid.scale, grid.zero, factor.feedback, factor.order)]
    round_gptq(weight, factor, grid)
    quantize(weight, gram, **SETTINGS)
    relative_error(weight, weight + 1, gram)
    assert torch.equal(weight, copies[0]) and torch.equal(gram, copies[1])
    for tensor, copy in zip((grid.scale, grid.zero, factor.feedback, factor.order), held,
                            strict=True):  # fmt: skip
        assert torch.equal(tensor, copy)


def test_relative_error():
    weight, gram = problem(dtype=torch.float32)
    assert relative_error(weight, weight, gram) == 0.0
    assert relative_error(weight, torch.zeros_like(weight), gram) == pytest.approx(1.0)
    assert relative_error(weight, 1.1 * weight, gram) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(torch.zeros_like(weight), weight, gram) == 0.0
