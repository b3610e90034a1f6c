"""Scales as they are stored, and what every method makes of scales in 8 bits."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from compresso.kernels import autoround, gptq, grid, higgs, hqq
from compresso.kernels.descent import descend
from compresso.kernels.gptq import relative_error
from compresso.kernels.grid import Packed, fit_grid, round_to_grid
from compresso.kernels.scales import in_parts, row_scale_of, storable

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
UNIFORM = {"bits": 2, "group_size": 16, "symmetric": True, "grid": "mse"}
FEEDBACK = {"damping": 0.01, "act_order": True, "refine": 2}
VECTOR = {"bits": 2, "dimension": 4, "block": 16}
METHODS = {
    "rtn": (grid.quantize, UNIFORM),
    "rtn minmax": (grid.quantize, UNIFORM | {"grid": "minmax", "bits": 4}),
    "rtn asymmetric": (grid.quantize, UNIFORM | {"symmetric": False}),
    "gptq": (gptq.quantize, UNIFORM | FEEDBACK),
    "gptq asymmetric": (gptq.quantize, UNIFORM | FEEDBACK | {"symmetric": False, "bits": 4}),
    "higgs": (higgs.quantize, VECTOR),
    "higgs mse": (higgs.quantize, VECTOR | {"dimension": 1, "fit": "mse"}),
    "gptq+higgs": (higgs.quantize_with_feedback, VECTOR | FEEDBACK),
    "hqq": (hqq.quantize, {"bits": 2, "group_size": 16}),
    "hqq 4 bits": (hqq.quantize, {"bits": 4, "group_size": 32}),
}


def problem(rows=48, columns=128):
    """A weight whose groups differ in size, and the gram of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(1024, columns, generator=generator)
    inputs = inputs + 0.3 * inputs @ mixing
    size = torch.rand(rows, columns // 16, generator=generator).add(0.2).repeat_interleave(16, 1)
    weight = 0.02 * size * torch.randn(rows, columns, generator=generator)
    return weight, inputs.T @ inputs / len(inputs)


def run(name, weight, gram, dtype=torch.bfloat16, **changed):
    method, options = METHODS[name]
    return method(weight, gram, **options | {"scale_bits": 8, "scale_dtype": dtype} | changed)


def of(codes):
    """What has the scales."""
    return codes.grid if isinstance(codes, Packed) else codes


def parts(codes):
    """The scales as multiples of a 128th of those of their rows."""
    return of(codes).scale.double() / of(codes).row_scale.double() * 128


@pytest.mark.parametrize("dtype", DTYPES)
def test_storable_scales(dtype):
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    given = torch.tensor([least / 4, -least / 4, info.max, -info.max, 1 / 3, -1 / 3])
    stored = storable(given, dtype=dtype, max_code=15)
    assert torch.equal(stored, stored.to(dtype).float())
    assert (stored[:2] == torch.tensor([least, -least])).all()
    assert (stored[2:4].abs() * 15).to(dtype).isfinite().all()
    torch.testing.assert_close(stored[4:], given[4:], rtol=info.eps / 2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_the_scale_of_a_row(dtype):
    weight = problem()[0]
    scale = weight.view(48, 8, 16).abs().amax(2)
    row_scale = row_scale_of(weight, scale, dtype=dtype)
    assert torch.equal(row_scale.to(dtype).float(), row_scale) and row_scale.shape == (48, 1)
    largest = scale.amax(1, keepdim=True) / (row_scale / 128)
    assert ((largest - 127).abs() < 127 * torch.finfo(dtype).eps).all()
    found = in_parts(scale, row_scale)
    assert ((found - scale).abs() <= row_scale / 256 * (1 + 1e-6)).all()
    numbers = found / (row_scale / 128)
    torch.testing.assert_close(numbers, numbers.round(), rtol=1e-6, atol=0)
    room = row_scale_of(weight, scale, dtype=dtype, room=1.25)
    torch.testing.assert_close(room, 1.25 * row_scale, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_signs_and_ends():
    given = torch.tensor([[0.0, -1e-9, 0.4, -0.4, 5.0, -5.0]])
    row_scale = torch.tensor([[1.28]])
    found = storable(given, dtype=torch.float32, max_code=3, row_scale=row_scale)
    expected = torch.tensor([[0.01, -0.01, 0.4, -0.4, 1.27, -1.27]])
    torch.testing.assert_close(found, expected)
    assert in_parts(given[:, :1], row_scale).item() == 0


def test_groups_of_zeros_have_no_say():
    weight = torch.full((3, 32), 1e-3)
    weight[:, 16:], weight[2] = 0, 0
    scale = torch.where(weight.view(3, 2, 16).amax(2) > 0, 1e-3, 1.0)
    row_scale = row_scale_of(weight, scale, dtype=torch.float32)
    torch.testing.assert_close(row_scale[:2], torch.full((2, 1), 1e-3 * 128 / 127))
    assert row_scale[2].item() == pytest.approx(128 / 127)


# ---------------------------------------------------------------- the methods


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_scales_are_whole_parts(name, dtype):
    weight, gram = problem()
    found = run(name, weight, gram, dtype)
    row_scale = of(found).row_scale
    assert row_scale.shape == (48, 1) and torch.equal(row_scale.to(dtype).float(), row_scale)
    numbers = parts(found).round()
    assert numbers.abs().max() <= 127 and numbers.abs().max() > 90
    if "higgs" not in name:
        assert (numbers != 0).all()
    assert torch.equal((numbers.float() * (row_scale / 128)), of(found).scale)


@pytest.mark.parametrize("name", METHODS)
def test_little_is_lost(name):
    weight, gram = problem()
    gram = gram if "gptq" in name else None
    losses = [
        relative_error(weight, run(name, weight, problem()[1], scale_bits=bits).decode(), gram)
        for bits in (16, 8)
    ]
    assert losses[1] < 1.04 * losses[0]


@pytest.mark.parametrize("name", METHODS)
def test_rows_do_not_depend_on_each_other(name, monkeypatch):
    weight, gram = problem()
    copies = weight.clone(), gram.clone()
    whole = run(name, weight, gram)
    assert torch.equal(weight, copies[0]) and torch.equal(gram, copies[1])
    both = run(name, torch.cat((weight, 3 * weight.flip(1))), gram)
    first, second = both.split([48, 48])
    assert torch.equal(first.decode(), whole.decode())
    assert torch.equal(of(first).row_scale, of(whole).row_scale)
    assert len(of(second).row_scale) == 48
    for module, tile in (("sweep", "CPU_WEIGHTS"), ("tiles", "CPU_TILE")):
        monkeypatch.setattr(f"compresso.kernels.{module}.{tile}", 5 * 128)
    sliced = run(name, weight, gram)
    torch.testing.assert_close(sliced.decode(), whole.decode(), rtol=1e-2, atol=1e-3)
    assert torch.equal(of(sliced).row_scale, of(whole).row_scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_hard(name, dtype):
    """Groups and rows of zeros, constant rows, a large weight, rows of extreme size, dead input."""
    weight, gram = problem(rows=9)
    weight[0], weight[1, :48], weight[2], weight[3, 70] = 0, 0, 0.5, 1e3
    weight[4] *= 1e-6
    weight[5] *= 1e-30
    weight[6] *= torch.finfo(dtype).max / 4  # some of the row are near a fiftieth
    weight[7, 16:] *= 1e-9
    dead = torch.ones(128)
    dead[100:110] = 0
    gram *= dead * dead[:, None]
    decoded, plain = (run(name, weight, gram, dtype, scale_bits=b).decode() for b in (8, 16))
    assert decoded.isfinite().all()
    assert (decoded[0] == 0).all()
    if name != "gptq+higgs":  # whose descent also moves blocks of zeros
        assert (decoded[1, :32] == 0).all()
    kept = [1, 2, 3, 6, 7, 8] + [4, 5] * (dtype != torch.float16)  # there too small for scales
    lost, before = (
        (found - weight)[kept].double().norm(dim=1) / weight[kept].double().norm(dim=1)
        for found in (decoded, plain)
    )
    assert (lost < 1.25 * before + 0.01).all()


def test_zeros_that_are_not_whole_are_in_eight_bits():
    for bits in (2, 3, 4, 8):
        found = run("hqq", problem()[0], None, bits=bits)
        assert found.zero_bits == 8
        zero = found.zero * 2.0 ** (8 - bits)
        assert torch.equal(zero, zero.round()) and zero.min() >= 0 and zero.max() <= 255
        assert found.split([8, 40])[1].zero_bits == 8


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_pass_of_descent_raises_the_sum(symmetric):
    weight, gram = problem()
    options = {"bits": 2, "group_size": 16, "symmetric": symmetric, "scale_bits": 8}
    found = round_to_grid(weight, fit_grid(weight, **options, scale_dtype=torch.float32, room=1.15))
    losses = []
    for _ in range(4):
        change = (weight - found.decode()).double()
        losses.append(((change @ gram.double()) * change).sum(1))
        found = descend(weight, found, gram, damping=1e-6, passes=1)
        assert torch.equal(parts(found).round().float() * (found.grid.row_scale / 128),
                           found.grid.scale)  # fmt: skip
    assert all((b <= a * (1 + 1e-4)).all() for a, b in pairwise(losses))
    assert losses[-1].sum() < 0.7 * losses[0].sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_trained_is_what_is_stored(symmetric, dtype):
    weight, gram = problem()
    weight[3, 16:] *= 1e-4  # scales of one part, far from the best ones
    start = run("gptq", weight, gram, dtype, symmetric=symmetric)
    found = autoround.latent(weight, start, symmetric=symmetric)
    same = autoround.settle(found, found.offset(), found.clip())
    assert torch.equal(same.grid.scale, start.grid.scale)
    generator = torch.Generator().manual_seed(1)
    offset = torch.rand(weight.shape, generator=generator) - 0.5
    clip = 0.5 + torch.rand(found.clip().shape, generator=generator)
    settled = autoround.settle(found, offset, clip)
    assert torch.equal(settled.grid.row_scale, start.grid.row_scale)
    numbers = parts(settled).round()
    assert numbers.abs().min() >= 1 and numbers.abs().max() <= 127
    assert torch.equal(numbers.float() * (start.grid.row_scale / 128), settled.grid.scale)
    trained = autoround.decode(found, offset, clip).to(dtype).float()
    assert torch.equal(trained, settled.decode())
