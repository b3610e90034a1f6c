"""Codes as a dense stream of bits, the layout of compressed-tensors' `pack-quantized`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from compresso.kernels.tiles import on_each, row_tiles


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack each row into 32-bit words: code k takes bits k * bits and up, lowest bit first.

    codes: (rows, columns) uint8, below 2**bits. Not modified.
    bits:  1 to 8; a code that does not fit a word runs on into the next.

    Returns (rows, ceil(columns * bits / 32)) int32; bits after the last code are 0. The machine
    must be little-endian.

    Source: compressed-tensors 0.20, `pack_to_int32`. Up to 0.17 its 3-bit layout was another.
    """
    rows, columns = codes.shape
    words = torch.empty(rows, -(-columns * bits // 32), dtype=torch.int32, device=codes.device)

    def pack(here: slice) -> None:
        part = _resize(codes[here], columns + -columns % 8).view(torch.int64)
        for width, used, mask in _halvings(bits):
            part = (part & mask) | (((part >> width) & mask) << used)
        stream = part.view(torch.uint8).view(*part.shape, 8)[..., :bits].flatten(1)
        words[here] = _resize(stream, words.shape[1] * 4).view(torch.int32)

    on_each(pack, row_tiles(codes), codes.device)
    return words


def unpack_rows(words: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that `pack_rows` packed, (rows, columns) uint8.

    words: (rows, ceil(columns * bits / 32)) int32. Not modified.
    """
    rows = len(words)
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=words.device)

    def unpack(here: slice) -> None:
        part = words[here]
        # By way of one dimension: a single column counts as contiguous whatever its stride.
        stream = part.flatten().view(torch.uint8).view(len(part), -1)
        stream = _resize(stream, -(-columns // 8) * bits).view(len(stream), -1, bits)
        part = pad(stream, (0, 8 - bits)).view(torch.int64).squeeze(2)
        for width, used, mask in reversed(_halvings(bits)):
            part = (part & mask) | (((part >> used) & mask) << width)
        codes[here] = part.view(torch.uint8)[:, :columns]

    on_each(unpack, row_tiles(codes), codes.device)
    return codes


def _halvings(bits: int) -> list[tuple[int, int, int]]:
    """The steps that bring eight codes, the bytes of a 64-bit integer, together.

    Each joins neighbouring fields of `width` bits, of which the lowest `used` hold codes; `mask`
    has these bits set in the first field of every pair.
    """
    steps = []
    for width in (8, 16, 32):
        used = bits * width // 8
        if used == width:
            continue
        mask = sum((2**used - 1) << at for at in range(0, 64, 2 * width))
        steps.append((width, used, mask))
    return steps


def _resize(stream: Tensor, size: int) -> Tensor:
    """The rows of a stream of bytes cut, or continued with zeros, to `size` bytes.

    A copy: a lone row counts as contiguous whatever its stride, and then cannot be viewed as words.
    """
    resized = stream.new_zeros(len(stream), size)
    kept = min(size, stream.shape[1])
    resized[:, :kept] = stream[:, :kept]
    return resized
