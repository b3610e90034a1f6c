"""Against theory, exhaustive search, and what the methods promise."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from compresso.errors import ConfigError, NumericalError
from compresso.kernels import gptq, sweep, tiles, vector_sweep
from compresso.kernels.gptq import factorize, relative_error
from compresso.kernels.hadamard import transform, transform_gram
from compresso.kernels.higgs import descend, quantize, quantize_with_feedback
from compresso.kernels.vector_grid import expected_error, vector_grid
from compresso.kernels.vector_sweep import Metric, round_in_turn

GRIDS = [(2, 1), (3, 1), (4, 1), (8, 1), (2, 2), (3, 2), (4, 2), (2, 4)]
PLAIN = dict(bits=2, dimension=2, block=64, scale_dtype=torch.bfloat16)
FEEDBACK = PLAIN | dict(damping=0.01, act_order=True, refine=2)


def problem(rows=48, columns=128, *, seed=0):
    """A weight and the gram of correlated inputs with a few loud columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    loudness = torch.rand(columns, generator=generator) ** 4 * 10 + 0.1
    inputs = torch.randn(2048, columns, generator=generator)
    inputs = (inputs + 0.3 * inputs @ mixing) * loudness
    weight = torch.randn(rows, columns, generator=generator)
    return weight, inputs.T @ inputs / len(inputs)


def exact(codes):
    """The weights before they are rounded to the stored type."""
    return replace(codes, dtype=torch.float32).decode()


def losses(weight, codes, gram, damping=0.0):
    """The sum of every row, float64."""
    change = (weight - exact(codes)).double()
    gram = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(len(gram))
    return ((change @ gram) * change).sum(1)


@pytest.mark.parametrize("bits, dimension", GRIDS)
def test_normal_weights_have_the_error_of_the_grid(bits, dimension):
    weight = torch.randn(256, 2048, generator=torch.Generator().manual_seed(1))
    found = quantize(weight, **PLAIN | dict(bits=bits, dimension=dimension, block=1024))
    table = expected_error(dimension, 2 ** (bits * dimension))
    assert relative_error(weight, exact(found)) == pytest.approx(table, rel=0.01)
    assert found.codes.shape == (256, 2048 // dimension)
    assert found.codes.int().max() < 2 ** (bits * dimension)


def test_weights_that_are_not_normal_have_it_after_rotation():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 2048, generator=generator)
    weight = weight.sign() * weight.abs() ** 3
    found = quantize(weight, **PLAIN | dict(block=1024))
    assert relative_error(weight, exact(found)) == pytest.approx(expected_error(2, 16), rel=0.02)


def test_the_error_is_that_of_the_rotated_weights():
    weight = problem()[0]
    found = quantize(weight, **PLAIN)
    levels = found.grid.points[found.codes.long()].view(48, 2, 64) * found.scale[..., None]
    rotated = transform(weight, 64)
    torch.testing.assert_close(
        relative_error(weight, exact(found)), relative_error(rotated, levels.flatten(1))
    )
    torch.testing.assert_close(exact(found), transform(levels, 64).flatten(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scales_and_weights_are_values_of_the_stored_type(dtype):
    weight, gram = problem()
    for found in (
        quantize(weight, **PLAIN | dict(scale_dtype=dtype)),
        quantize_with_feedback(weight, gram, **FEEDBACK | dict(scale_dtype=dtype)),
    ):
        assert torch.equal(found.scale.to(dtype).float(), found.scale)
        assert torch.equal(found.decode().to(dtype).float(), found.decode())
        assert torch.equal(found.decode(), exact(found).to(dtype).float())
    blocks = transform(weight, 64).view(48, 2, 64)
    expected = blocks.square().mean(-1).sqrt().to(dtype).float()
    nearly = dict(rtol=torch.finfo(dtype).eps + 1e-6, atol=0)
    torch.testing.assert_close(quantize(weight, **PLAIN).scale, expected, rtol=0.01, atol=0)
    found = quantize(weight, **PLAIN | dict(scale_dtype=dtype))
    torch.testing.assert_close(found.scale, expected, **nearly)


@pytest.mark.parametrize("bits, gain", [(2, 0.98), (4, 0.9)])
def test_a_search_for_scales_lowers_the_error_of_every_block(bits, gain):
    weight = problem(rows=200)[0]
    weight[3, :64] = 0
    settings = PLAIN | dict(bits=bits)
    plain, found = quantize(weight, **settings), quantize(weight, **settings, fit="mse")
    assert torch.equal(found.scale.bfloat16().float(), found.scale)
    before, after = (
        (exact(codes) - weight).view(200, 2, 64).square().sum(-1) for codes in (plain, found)
    )
    # The scale that is right for given codes can be off by what storing it rounds away.
    assert (after <= before * (1 + 2**-8)).all()
    assert after.sum() < gain * before.sum()
    assert found.scale[3, 0] == 0


def vectors_in_turn(weight, gram, scale, points, order):
    """Every vector becomes the point that costs least if all later weights may still change."""
    dimension = points.shape[1]
    codes = torch.zeros(len(weight), len(gram) // dimension, dtype=torch.int64)
    for row in range(len(weight)):
        done: list[int] = []
        changes = torch.zeros(0, dtype=torch.float64)
        for vector in order:
            here = list(range(vector * dimension, (vector + 1) * dimension))
            later = [column for column in range(len(gram)) if column not in done + here]
            fixed = done + here
            cost = gram[fixed][:, fixed]
            if later:
                across = gram[fixed][:, later]
                cost = cost - across @ torch.linalg.inv(gram[later][:, later]) @ across.T
            change = weight[row, here] - points * scale[row]
            trials = torch.cat((changes.expand(len(points), -1), change), 1)
            best = int(((trials @ cost) * trials).sum(1).argmin())
            codes[row, vector] = best
            done, changes = fixed, trials[best]
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits, dimension", [(2, 1), (2, 2), (2, 4)])
def test_codes_are_those_of_exhaustive_search(bits, dimension, act_order):
    weight, gram = problem(rows=5, columns=16)
    settings = FEEDBACK | dict(bits=bits, dimension=dimension, block=16, act_order=act_order)
    found = quantize_with_feedback(weight, gram, **settings | dict(refine=0))
    rotated = transform_gram(gram.double(), 16)
    damped = rotated + 0.01 * rotated.diagonal().mean() * torch.eye(16)
    order = torch.arange(16 // dimension)
    if act_order:
        order = rotated.diagonal().view(-1, dimension).sum(1).argsort(descending=True)
        assert not torch.equal(order, torch.arange(16 // dimension))
    expected = vectors_in_turn(
        transform(weight.double(), 16), damped, found.scale.double(),
        vector_grid(dimension, 2 ** (bits * dimension)).points.double(), order.tolist(),
    )  # fmt: skip
    assert torch.equal(found.codes.long(), expected)


@pytest.mark.parametrize("block", [4, 12, 64, 128])
def test_blocks_do_not_change_what_is_rounded_in_turn(block):
    weight, gram = problem()
    gram = gram.double()
    metric = Metric.of_factor(factorize(gram, damping=0.01, act_order=False), 4)
    points, scale = vector_grid(4, 256).points.double(), torch.ones(32, 48, dtype=torch.float64)
    anchor = weight.double().T.contiguous()
    expected = anchor.clone()
    codes = round_in_turn(expected, anchor, metric, points, scale)
    changes = anchor.clone()
    assert torch.equal(round_in_turn(changes, anchor, metric, points, scale, block=block), codes)
    torch.testing.assert_close(changes, expected)


def test_tiles_do_not_change_the_codes(monkeypatch):
    weight, gram = problem()
    plain, fed = quantize(weight, **PLAIN), quantize_with_feedback(weight, gram, **FEEDBACK)
    monkeypatch.setattr(tiles, "CPU_TILE", 300)
    monkeypatch.setattr(sweep, "CPU_WEIGHTS", 900)
    monkeypatch.setattr(vector_sweep, "SCORES", 100)
    assert torch.equal(quantize(weight, **PLAIN).codes, plain.codes)
    again = quantize_with_feedback(weight, gram, **FEEDBACK)
    assert torch.equal(again.codes, fed.codes)
    assert torch.equal(again.decode(), fed.decode())


def test_white_inputs_need_no_feedback():
    weight = problem()[0]
    found = quantize_with_feedback(weight, torch.eye(128), **FEEDBACK | dict(refine=0))
    plain = quantize(weight, **PLAIN)
    assert torch.equal(found.scale, plain.scale)
    assert (found.codes != plain.codes).float().mean() < 0.001


@pytest.mark.parametrize("bits, dimension", [(2, 1), (2, 2), (2, 4), (3, 2)])
def test_feedback_and_refinement_each_lower_the_error(bits, dimension):
    weight, gram = problem()
    grid = dict(bits=bits, dimension=dimension)
    plain = relative_error(weight, quantize(weight, **PLAIN | grid).decode(), gram)
    fed, refined = (
        relative_error(
            weight,
            quantize_with_feedback(weight, gram, **FEEDBACK | grid | dict(refine=refine)).decode(),
            gram,
        )
        for refine in (0, 3)
    )
    assert fed < 0.6 * plain
    assert refined < 0.85 * fed


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_third_better_than_gptq_with_more_bits_stored(bits):
    weight, gram = problem(columns=256)
    found = quantize_with_feedback(weight, gram, **FEEDBACK | dict(bits=bits, block=256))
    uniform = gptq.quantize(
        weight, gram, bits=bits, group_size=64, symmetric=True, grid="mse", damping=0.01,
        act_order=True, scale_dtype=torch.bfloat16,
    )  # fmt: skip
    error = relative_error(weight, found.decode(), gram)
    assert error < 0.67 * relative_error(weight, uniform.decode(), gram)


@pytest.mark.parametrize("bits, dimension", [(2, 1), (2, 2), (4, 2), (2, 4)])
def test_no_pass_raises_the_sum_of_any_row(bits, dimension):
    weight, gram = problem()
    found = quantize(weight, **PLAIN | dict(bits=bits, dimension=dimension))
    before = first = losses(weight, found, gram, damping=0.01)
    for _ in range(3):
        found = descend(weight, found, transform_gram(gram, 64), damping=0.01, passes=1)
        after = losses(weight, found, gram, damping=0.01)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    assert before.sum() < 0.6 * first.sum()


def test_the_end_is_a_minimum_of_every_vector_and_scale():
    weight, gram = problem(rows=3, columns=16)
    start = quantize(weight, **PLAIN | dict(block=8, scale_dtype=torch.float32))
    found = descend(weight, start, transform_gram(gram, 8), damping=0.01, passes=60)
    least = losses(weight, found, gram, damping=0.01) * (1 - 1e-5)
    for vector in range(8):
        for code in range(16):
            codes = found.codes.clone()
            codes[:, vector] = code
            assert (losses(weight, replace(found, codes=codes), gram, damping=0.01) >= least).all()
    for factor in (0.99, 1.01):
        for group in range(2):
            scale = found.scale.clone()
            scale[:, group] *= factor
            assert (losses(weight, replace(found, scale=scale), gram, damping=0.01) >= least).all()


@pytest.mark.parametrize("columns, block", [(896, 128), (688, 16), (2, 2)])
def test_blocks_fall_back_to_what_divides_the_columns(columns, block):
    weight, gram = problem(rows=8, columns=columns)
    plain = quantize(weight, **PLAIN | dict(block=1024))
    fed = quantize_with_feedback(weight, gram, **FEEDBACK | dict(block=1024))
    for found in (plain, fed):
        assert found.block == block
        assert found.scale.shape == (8, columns // block)
        assert relative_error(weight, found.decode()) < 0.6
    assert relative_error(weight, fed.decode(), gram) < relative_error(
        weight, plain.decode(), gram
    ) * (1 if columns > 2 else 1.01)


def test_zeros_stay_zero_and_constant_rows_are_kept():
    weight, gram = problem()
    weight[3, :64] = 0
    weight[4] = 0
    weight[5] = 0.25
    for found in (quantize(weight, **PLAIN), quantize_with_feedback(weight, gram, **FEEDBACK)):
        decoded = found.decode()
        assert decoded.isfinite().all()
        assert (decoded[4] == 0).all()
        assert relative_error(weight[5:6], decoded[5:6]) < 2.5
    assert (quantize(weight, **PLAIN).decode()[3, :64] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_and_small_weights_decode_to_finite_ones(dtype):
    largest, least = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    weight = weight / weight.abs().max()
    for factor in (largest / 16, least):
        found = quantize(weight * factor, **PLAIN | dict(scale_dtype=dtype))
        assert found.decode().isfinite().all()
    with_peak = torch.full((1, 64), largest / 64)
    assert quantize(with_peak, **PLAIN | dict(scale_dtype=dtype)).decode().isfinite().all()


def test_columns_without_input():
    weight, gram = problem()
    gram[[3, 40, 127]] = 0
    gram[:, [3, 40, 127]] = 0
    found = quantize_with_feedback(weight, gram, **FEEDBACK)
    plain = quantize(weight, **PLAIN)
    assert found.decode().isfinite().all()
    assert losses(weight, found, gram).sum() < 0.6 * losses(weight, plain, gram).sum()


def test_a_gram_of_zeros_rounds_to_nearest():
    weight = problem()[0]
    found = quantize_with_feedback(weight, torch.zeros(128, 128), **FEEDBACK)
    plain = quantize(weight, **PLAIN)
    assert torch.equal(found.scale, plain.scale)
    assert (found.codes != plain.codes).float().mean() < 0.001


@pytest.mark.parametrize("value", [-1000.0, float("nan")])
def test_a_gram_that_is_not_positive_definite_is_refused(value):
    weight, gram = problem()
    gram[5, 5] = value
    with pytest.raises(NumericalError, match="128 columns is not positive definite at damping"):
        quantize_with_feedback(weight, gram, **FEEDBACK)


def test_what_no_grid_can_do_is_refused():
    weight, gram = problem(rows=2, columns=27)
    for method, settings in ((quantize, PLAIN), (quantize_with_feedback, FEEDBACK)):
        with pytest.raises(ConfigError, match="27 columns do not divide into vectors of") as raised:
            method(weight, gram, **settings)
        assert "smaller `dimension`" in raised.value.hint
        for bits, dimension in ((8, 2), (3, 4), (2, 3), (5, 1)):
            expected = f"no vector grid has `bits` {bits} and `dimension` {dimension}"
            with pytest.raises(ConfigError, match=expected) as raised:
                method(weight, gram, **settings | dict(bits=bits, dimension=dimension))
            assert raised.value.hint.startswith("`dimension` 1 has 2, 3, 4 and 8 bits, 2 has")


def test_one_column_at_a_time_takes_any_width():
    weight, gram = problem(rows=4, columns=27)
    found = quantize_with_feedback(weight, gram, **FEEDBACK | dict(dimension=1, bits=4))
    assert found.block == 1 and relative_error(weight, found.decode(), gram) < 0.05


def test_stacked_rows_get_the_codes_they_get_alone():
    weight, gram = problem(rows=60)
    whole = quantize_with_feedback(weight, gram, **FEEDBACK)
    sizes = [1, 32, 27]
    for part, codes in zip(weight.split(sizes), whole.split(sizes), strict=True):
        alone = quantize_with_feedback(part, gram, **FEEDBACK)
        assert torch.equal(alone.codes, codes.codes)
        assert torch.equal(alone.scale, codes.scale)
        assert torch.equal(alone.decode(), codes.decode())


def test_arguments_are_not_modified():
    weight, gram = problem()
    start = quantize(weight, **PLAIN)
    tensors = (weight, gram, start.codes, start.scale, start.grid.points)
    copies = [tensor.clone() for tensor in tensors]
    quantize(weight, gram, **PLAIN)
    quantize_with_feedback(weight, gram, **FEEDBACK)
    descend(weight, start, gram, damping=0.01, passes=2)
    start.decode()
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_nothing_outlives_a_call():
    weight, gram = problem()
    quantize_with_feedback(weight, gram, **FEEDBACK)  # the grid and its cubes are kept on purpose
    gc.collect()
    before = {id(item) for item in gc.get_objects() if type(item) is torch.Tensor}
    gc.disable()
    try:
        quantize_with_feedback(weight, gram, **FEEDBACK)
        held = [item for item in gc.get_objects() if type(item) is torch.Tensor]
    finally:
        gc.enable()
    assert not [item.shape for item in held if id(item) not in before and item.ndim > 1]


@pytest.mark.gpu
def test_a_gpu_finds_weights_as_good():
    weight, gram = problem()
    for method, settings in ((quantize, PLAIN), (quantize_with_feedback, FEEDBACK)):
        here = relative_error(weight, method(weight, gram, **settings).decode(), gram)
        found = method(weight.cuda(), gram.cuda(), **settings).decode().cpu()
        assert relative_error(weight, found, gram) == pytest.approx(here, rel=0.02)


@pytest.mark.parametrize(
    ("bits", "columns", "dimension"), [(2, 64, 4), (2, 66, 2), (3, 64, 2), (8, 64, 1)]
)
def test_the_largest_dimension_with_a_grid_is_taken(bits, columns, dimension):
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    options = {"bits": bits, "block": 64, "scale_dtype": torch.float32}
    found = quantize(weight, dimension=None, **options)
    assert found.grid.dimension == dimension
    assert torch.equal(found.codes, quantize(weight, dimension=dimension, **options).codes)
