"""Against numpy's `packbits` and compressed-tensors' own packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)

from compresso.kernels import tiles
from compresso.kernels.packing import pack_rows, unpack_rows

BITS = pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
COLUMNS = pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 64, 100, 720])


def random_codes(rows, columns, bits):
    generator = torch.Generator().manual_seed(columns * 8 + bits)
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


def stream(codes, bits):
    """The words bit by bit."""
    rows, columns = codes.shape
    each = (codes.numpy()[..., None] >> np.arange(bits)) & 1
    packed = np.packbits(each.reshape(rows, -1), axis=1, bitorder="little")
    words = -(-columns * bits // 32)
    padded = np.zeros((rows, words * 4), np.uint8)
    padded[:, : packed.shape[1]] = packed
    return torch.from_numpy(padded.view("<i4").astype(np.int32))


@BITS
@COLUMNS
def test_words_are_the_bit_stream(bits, columns):
    codes = random_codes(5, columns, bits)
    words = pack_rows(codes, bits)
    assert words.dtype is torch.int32 and words.is_contiguous()
    assert torch.equal(words, stream(codes, bits))
    assert torch.equal(unpack_rows(words, bits, columns), codes)


@BITS
@COLUMNS
def test_words_are_those_of_compressed_tensors(bits, columns):
    codes = random_codes(6, columns, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    words = pack_to_int32(signed, bits)
    assert torch.equal(pack_rows(codes, bits), words)
    assert torch.equal(unpack_rows(words, bits, columns), codes)
    assert torch.equal(unpack_from_int32(pack_rows(codes, bits), bits, codes.shape), signed)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zeros_pack_along_the_other_dimension(bits):
    zeros = random_codes(40, 3, bits)
    signed = (zeros.int() - 2 ** (bits - 1)).to(torch.int8)
    expected = pack_to_int32(signed, bits, packed_dim=0)
    assert torch.equal(pack_rows(zeros.t(), bits).t(), expected)
    assert torch.equal(unpack_rows(expected.t(), bits, 40).t(), zeros)


@pytest.mark.parametrize("bits", [3, 4])
def test_parts_do_not_show(bits, monkeypatch):
    codes = random_codes(37, 100, bits)
    words = pack_rows(codes, bits)
    monkeypatch.setattr(tiles, "CPU_TILE", 400)
    assert torch.equal(pack_rows(codes, bits), words)
    assert torch.equal(unpack_rows(words, bits, 100), codes)


def test_arguments_are_not_modified():
    codes = random_codes(4, 64, 3)
    copy, words = codes.clone(), pack_rows(codes, 3)
    held = words.clone()
    unpack_rows(words, 3, 64)
    assert torch.equal(codes, copy) and torch.equal(words, held)
