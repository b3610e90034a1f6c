"""Against the formula, plain rounding, and matrices known to be exact."""

from __future__ import annotations

import pytest
import torch

from compresso.kernels import hqq
from compresso.kernels.hqq import AffineCodes, quantize

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def matrix(rows=48, columns=128, heavy=False):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    return 0.02 * (weight**3 if heavy else weight)


def rounded_on_span(weight, bits, group_size, *, with_zero):
    """Plain rounding with a zero that is not whole."""
    groups = weight.reshape(len(weight), -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if with_zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    codes = (groups / scale - low / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + low).view_as(weight)


def mean_errors(weight, decoded, group_size):
    return (weight - decoded).abs().view(len(weight), -1, group_size).mean(-1)


@pytest.mark.parametrize("with_zero", [True, False])
@pytest.mark.parametrize("heavy", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_no_group_is_worse_than_plain_rounding(bits, group_size, heavy, with_zero):
    weight = matrix(heavy=heavy)
    found = quantize(weight, bits=bits, group_size=group_size, scale_dtype=torch.float32)
    plain = rounded_on_span(weight, bits, group_size, with_zero=with_zero)
    errors = mean_errors(weight, found.decode(), group_size)
    before = mean_errors(weight, plain, group_size)
    assert (errors <= before * (1 + 1e-4)).all()
    if bits < 8:
        assert errors.sum() < 0.98 * before.sum()


def test_one_step_of_the_formula_by_hand(monkeypatch):
    weight = torch.tensor([[-1.0, -0.9, 0.0, 0.3, 0.4, 1.1, 1.4, 2.0]])
    monkeypatch.setattr(hqq, "STEPS", 1)
    monkeypatch.setattr(hqq, "BETA", 10.0)
    scale, zero = torch.tensor(1.0), torch.tensor(1.0)
    errors = weight - ((weight + 1).round().clamp(0, 3) - 1)
    accepted = errors.sign() * (errors.abs() - errors.abs().pow(-0.3) / 10).clamp(min=0)
    accepted[errors == 0] = 0
    moved = ((weight + 1).round() - (weight - accepted)).mean()
    after = (weight + moved).round().clamp(0, 3) - moved
    assert (weight - after).abs().mean() < errors.abs().mean()  # so the step is what is kept
    found = quantize(weight, bits=2, group_size=-1, scale_dtype=torch.float32)
    assert (found.scale.item(), found.zero.item()) == (scale, pytest.approx(moved.item()))
    assert zero != found.zero
    torch.testing.assert_close(found.decode(), after)


def test_the_best_step_is_kept_not_the_last(monkeypatch):
    weight, before = matrix(heavy=True), None
    for steps in range(8):
        monkeypatch.setattr(hqq, "STEPS", steps)
        found = quantize(weight, bits=3, group_size=32, scale_dtype=torch.float32)
        errors = mean_errors(weight, found.decode(), 32)
        assert before is None or (errors <= before * (1 + 1e-5)).all()
        before = errors


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_on_a_grid_stays(bits):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (8, 64), generator=generator)
    codes[:, 0], codes[:, 1] = 0, 2**bits - 1
    weight = (codes - 1.25) * 0.5
    found = quantize(weight, bits=bits, group_size=-1, scale_dtype=torch.float32)
    assert torch.equal(found.decode(), weight)
    assert torch.equal(found.codes, codes.to(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_of_one_value_are_exact_and_all_is_stored_as_it_is_decoded(bits, dtype):
    weight = matrix().to(dtype).float()
    weight[:, 7] = 0
    weight[0] = 0
    weight[1] = weight[1, 0]
    weight[2, :64] = -weight[2, 0].abs()
    weight[3] = 1.0
    weight[3, 5] = 1.0 + 2**-7  # all but constant: the zero that spans it needs more digits
    weight[4] *= 1e-3
    weight[5] *= 1e5
    found = quantize(weight, bits=bits, group_size=64, scale_dtype=dtype)
    decoded = found.decode()
    assert torch.isfinite(decoded).all()
    assert torch.equal(decoded[:2], weight[:2])
    assert torch.equal(decoded[2, :64], weight[2, :64])
    assert (decoded[3] - 1).abs().max() <= 2**-6
    for stored in (found.scale, found.zero, decoded):
        assert torch.equal(stored.to(dtype).float(), stored)
    assert (found.scale != 0).all()
    assert int(found.codes.max()) < 2**bits


def test_scale_of_the_weights_does_not_matter():
    weight = matrix()
    one = quantize(weight, bits=3, group_size=32, scale_dtype=torch.float32)
    other = quantize(weight * 2.0**-20, bits=3, group_size=32, scale_dtype=torch.float32)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.decode() * 2.0**-20, other.decode())


def test_decode_and_split_by_hand():
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 2.0], [1.0, -1.0]])
    zero = torch.tensor([[0.5, 1.0], [-1.0, 0.25]])
    whole = AffineCodes(codes, scale, zero, 2, torch.bfloat16)
    expected = torch.tensor([[-0.25, 0.25, 2.0, 4.0], [4.0, 3.0, -0.75, 0.25]])
    assert torch.equal(whole.decode(), expected)
    first, second = whole.split([1, 1])
    assert torch.equal(torch.cat((first.decode(), second.decode())), expected)
    assert (second.bits, second.dtype) == (2, torch.bfloat16)


def test_arguments_are_unchanged_and_any_slicing_of_rows_is_the_same(monkeypatch):
    weight = matrix()
    copy = weight.clone()
    whole = quantize(weight, torch.eye(128), bits=3, group_size=32, scale_dtype=torch.bfloat16)
    assert torch.equal(weight, copy)
    monkeypatch.setattr("compresso.kernels.sweep.CPU_WEIGHTS", 128 * 5)
    sliced = quantize(weight, bits=3, group_size=32, scale_dtype=torch.bfloat16)
    assert torch.equal(whole.decode(), sliced.decode())


def test_groups_that_do_not_divide():
    with pytest.raises(ValueError, match="100 columns do not divide into groups of 64"):
        quantize(torch.ones(2, 100), bits=4, group_size=64, scale_dtype=torch.float32)
