"""Bit by bit against bitsandbytes, and the levels against the quantiles they are."""

from __future__ import annotations

import bitsandbytes.functional as reference
import pytest
import torch

from compresso.kernels.normal_float import (
    dynamic_levels,
    levels,
    quantize,
    quantize_rows,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def matrix(dtype=torch.float32, rows=64, columns=256):
    """With a row of zeros, a constant one, a dead column, and rows of very different size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    weight[0], weight[1], weight[:, 3] = 0, -0.3, 0
    weight[2] *= 1e-4
    weight[3] *= 1e3
    return weight.to(dtype)


def packed(codes):
    flat = codes.flatten()
    return (flat[::2] << 4 | flat[1::2])[:, None]


def test_levels():
    for kind in ("nf4", "fp4"):
        assert torch.equal(levels(kind), reference.get_4bit_type(kind, device="cpu"))
    assert torch.equal(dynamic_levels(), reference.create_dynamic_map())


def test_nf4_levels_are_normal_quantiles():
    ends = 0.9677083
    below = torch.linspace(1 - ends, 0.5, 8, dtype=torch.float64)
    above = torch.linspace(0.5, ends, 9, dtype=torch.float64)[1:]
    quantiles = torch.special.ndtri(torch.cat((below, above)))
    torch.testing.assert_close(
        levels("nf4").double(), quantiles / quantiles.max(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [64, 128, 256])
def test_four_bits_are_those_of_bitsandbytes(kind, dtype, block):
    weight = matrix(dtype)
    found = quantize(
        weight.float(), group_size=block, scale_bits=None, scale_dtype=dtype, kind=kind
    )
    codes, state = reference.quantize_4bit(weight, blocksize=block, quant_type=kind)
    assert torch.equal(packed(found.codes), codes)
    assert torch.equal(found.absmax, state.absmax)
    assert torch.equal(found.decode(), reference.dequantize_4bit(codes, state).float())


@pytest.mark.parametrize("shape", [(7, 33), (10, 100), (24, 96)])
def test_blocks_that_run_across_rows(shape):
    weight = matrix(rows=shape[0], columns=shape[1])
    found = quantize(weight, group_size=64, scale_bits=None, scale_dtype=torch.float32)
    codes, state = reference.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(found.absmax, state.absmax)
    ours = packed(torch.cat((found.codes.flatten(), torch.full((weight.numel() % 2,), 7))).byte())
    assert torch.equal(ours, codes)
    for number, values in enumerate(weight.flatten().split(64)):
        decoded = found.decode().flatten()[number * 64 : number * 64 + len(values)]
        ends = levels("nf4") * values.abs().max()
        nearest = (values[:, None] - ends).abs().amin(1)
        torch.testing.assert_close((values - decoded).abs(), nearest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quantization_is_that_of_bitsandbytes(dtype):
    weight = matrix(dtype, rows=512)
    found = quantize(weight.float(), group_size=64, scale_bits=8, scale_dtype=dtype)
    codes, state = reference.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    nested = found.nested()
    assert torch.equal(packed(found.codes), codes)
    assert torch.equal(nested.offset, state.offset)
    assert torch.equal(nested.absmax, state.state2.absmax)
    # Its CPU kernel takes the neighbour of a few maxima that lie all but half way.
    theirs, table = state.absmax.int(), dynamic_levels()
    ours = nested.codes.int()
    assert (ours - theirs).abs().max() <= 1
    rest = (found.absmax - nested.offset).double()
    scaled = rest / nested.absmax.double().repeat_interleave(256)[: len(rest)]
    further = (scaled - table[theirs]).abs() - (scaled - table[ours]).abs()
    assert (further[ours != theirs] > 0).all()
    assert (ours != theirs).float().mean() < 0.01
    state.absmax = nested.codes  # what is stored is read the same
    assert torch.equal(found.decode(), reference.dequantize_4bit(codes, state).float())


def test_double_quantization_costs_little():
    weight = matrix(rows=256)[4:]
    errors = [
        (weight - quantize(weight, group_size=64, scale_bits=b, scale_dtype=torch.float32).decode())
        .square()
        .mean()
        for b in (None, 8)
    ]
    assert errors[0] < errors[1] < 1.01 * errors[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_are_those_of_bitsandbytes(dtype):
    weight = matrix(dtype)
    found = quantize_rows(weight.float(), scale_dtype=dtype)
    codes, absmax, _ = reference.int8_vectorwise_quant(weight.float())
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.absmax, absmax)
    expected = reference.int8_vectorwise_dequant(codes, absmax).to(dtype).float()
    assert torch.equal(found.decode(), expected)


@pytest.mark.parametrize("scale_bits", [None, 8])
def test_zeros_and_ends_are_exact(scale_bits):
    weight = torch.tensor([-0.75, 0.0, 0.75]).repeat(64, 64)
    weight[5] = 0
    found = quantize(weight, group_size=64, scale_bits=scale_bits, scale_dtype=torch.float32)
    assert torch.equal(found.decode() == 0, weight == 0)
    if scale_bits is None:
        assert torch.equal(found.decode(), weight)
    nothing = quantize(0 * weight, group_size=64, scale_bits=scale_bits, scale_dtype=torch.float32)
    assert torch.equal(nothing.decode(), 0 * weight)
    rows = quantize_rows(weight, scale_dtype=torch.float32).decode()
    torch.testing.assert_close(rows, weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale_bits", [None, 8])
def test_parts_of_a_stack_are_what_they_are_alone(scale_bits):
    weight = matrix()
    copy = weight.clone()
    options = {"group_size": 64, "scale_bits": scale_bits, "scale_dtype": torch.bfloat16}
    stacked = quantize(weight, **options)
    assert torch.equal(weight, copy)
    for part, alone in zip(stacked.split([40, 24]), weight.split([40, 24]), strict=True):
        assert torch.equal(part.decode(), quantize(alone, **options).decode())
    for part, alone in zip(
        quantize_rows(weight, scale_dtype=torch.bfloat16).split([40, 24]),
        weight.split([40, 24]),
        strict=True,
    ):
        alone_decoded = quantize_rows(alone, scale_dtype=torch.bfloat16).decode()
        assert torch.equal(part.decode(), alone_decoded)


def test_a_block_of_two_matrices_is_refused():
    whole = quantize(matrix(columns=96), group_size=64, scale_bits=None, scale_dtype=torch.float32)
    assert [part.codes.shape for part in whole.split([2, 62])] == [(2, 96), (62, 96)]
    with pytest.raises(ValueError, match="blocks of 64 run across matrices of 96 columns"):
        whole.split([3, 61])
