"""Uniform codes as blocks of GGUF types: the layouts of ggml-common.h, byte by byte.

A level is a code less its zero, a whole number, so that the weight is scale * level. Every type
stores levels of blocks of 32 or 256 weights with a float16 scale; how is said at each function,
with d for the scale and u for the bits that are stored. Blocks are rows of arrays here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compresso.kernels.grid import Packed
from compresso.kernels.hqq import AffineCodes

Array = np.ndarray[Any, Any]
SUPER = 256
LEAST, MOST = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
TILE = 2**22  # weights worked on at once


@dataclass(frozen=True)
class Blocks:
    """A matrix in a GGUF type.

    type:  as llama.cpp calls it. data: (rows, bytes of a row) uint8.
    rounded: what was rounded to float16, if it does not decode to just what the codes stand for:
             the offsets of groups, or their scales.
    """

    type: str
    data: Array
    rounded: Literal["scales", "offsets"] | None = None

    @property
    def exact(self) -> bool:
        """Whether it decodes to just what the codes stand for."""
        return self.rounded is None


@dataclass(frozen=True)
class _Type:
    """How levels become bytes.

    block:  weights of a block. encode: levels (blocks, block) int16 and d (blocks, 2) uint8, the
            bytes of a float16, to (blocks, bytes) uint8. fits: whether all levels can be stored.
    """

    name: str
    block: int
    encode: Callable[[Array, Array], Array]
    fits: Callable[[Array], bool]


def repack(codes: Packed | AffineCodes, *, rescale: bool = False) -> Blocks | None:
    """The same codes in the smallest GGUF type that holds them; None if there is none.

    codes:   of (rows, columns) weights. Not modified.
    rescale: take scales that float16 does not hold, too, as far as its normal numbers go, rounded.

    Zeros that are no whole numbers make offsets, which are rounded to float16: less than what
    rounding weights to float16 or bfloat16 comes to.
    """
    grid = codes.grid if isinstance(codes, Packed) else codes
    scale = grid.scale.float()
    half = scale.to(torch.float16)
    exact = torch.equal(half.float(), scale)
    normal = bool(((scale.abs() >= LEAST) & (scale.abs() <= MOST)).all())
    if not exact and not (rescale and normal):
        return None
    size = codes.codes.shape[1] // scale.shape[1]
    zero = grid.zero.float()
    if not torch.equal(zero, zero.round()):
        return _repack_offsets(codes.codes, half, zero, size, grid.bits)
    found = _repack_levels(codes.codes, half, zero, size)
    return found if exact or found is None else replace(found, rounded="scales")


def _repack_levels(codes: Tensor, scale: Tensor, zero: Tensor, size: int) -> Blocks | None:
    rows, columns = codes.shape
    tile = max(1, TILE // columns)
    for kind in _TYPES:
        if size % kind.block:
            continue
        parts = []
        for start in range(0, rows, tile):
            here = slice(start, start + tile)
            levels = _levels(codes[here], zero[here], size).reshape(-1, kind.block)
            if not kind.fits(levels):
                break
            each = scale[here].repeat_interleave(size // kind.block, dim=1)
            packed = kind.encode(levels, _halves(each.flatten()))
            parts.append(packed.reshape(len(codes[here]), -1))
        else:
            return Blocks(kind.name, np.concatenate(parts))
    return None


def _repack_offsets(
    codes: Tensor, scale: Tensor, zero: Tensor, size: int, bits: int
) -> Blocks | None:
    """Q4_1 or Q5_1: scale * code + offset, both float16."""
    if size % 32 or bits > 5:
        return None
    offset = (-scale.float() * zero).to(torch.float16)
    if not torch.isfinite(offset).all():
        return None
    each = [_halves(t.repeat_interleave(size // 32, dim=1).flatten()) for t in (scale, offset)]
    levels = codes.numpy().reshape(-1, 32)
    low = _nibbles(levels & 15)
    middle = [] if bits <= 4 else [_fifth_bits(levels)]
    data = np.concatenate([*each, *middle, low], axis=1).reshape(len(codes), -1)
    return Blocks("q4_1" if bits <= 4 else "q5_1", data, rounded="offsets")


def _levels(codes: Tensor, zero: Tensor, size: int) -> Array:
    grouped = codes.reshape(len(codes), -1, size).to(torch.int16)
    return (grouped - zero[..., None].to(torch.int16)).numpy()


def _halves(values: Tensor) -> Array:
    """The two bytes of each float16."""
    return values.contiguous().numpy().view(np.uint8).reshape(-1, 2)


def _nibbles(codes: Array) -> Array:
    """(blocks, 32) of at most 4 bits to (blocks, 16): the first half low, the second high."""
    return (codes[:, :16] | codes[:, 16:] << 4).astype(np.uint8)


def _fifth_bits(codes: Array) -> Array:
    """Bit 4 of (blocks, 32) codes as 4 bytes, that of the first weight lowest."""
    return np.packbits((codes >> 4 & 1).astype(np.uint8), axis=1, bitorder="little")


def _q4_0(levels: Array, scale: Array) -> Array:
    """Bytes d, 16 of u; w = d * (u - 8)."""
    return np.concatenate([scale, _nibbles(levels + 8)], axis=1)


def _q5_0(levels: Array, scale: Array) -> Array:
    """Bytes d, 4 of fifth bits, 16 of the others; w = d * (u - 16)."""
    codes = levels + 16
    return np.concatenate([scale, _fifth_bits(codes), _nibbles(codes & 15)], axis=1)


def _q8_0(levels: Array, scale: Array) -> Array:
    """Bytes d, 32 signed; w = d * u."""
    return np.concatenate([scale, levels.astype(np.int8).view(np.uint8)], axis=1)


def _tq2_0(levels: Array, scale: Array) -> Array:
    """Bytes 64 of u, d; w = d * (u - 1). With d = -s, u = 1 - level holds -2 to 1."""
    turned = scale.copy()
    turned[:, 1] ^= 0x80  # the sign
    return np.concatenate([_quarters(1 - levels), turned], axis=1)


def _q2_k(levels: Array, scale: Array) -> Array:
    """Bytes 16 of scale and minimum by 16 weights, 64 of u, d, d of minima; w = d (a u - m)."""
    zero = _zero(levels)
    whole = np.repeat((1 | zero << 4).astype(np.uint8), 16, axis=1)
    return np.concatenate([whole, _quarters(levels + zero), scale, scale], axis=1)


def _q3_k(levels: Array, scale: Array) -> Array:
    """Bytes 32 of third bits, 64 of the others, 12 of scales by 16 weights, d.

    w = d * (a - 32) * (u - 4). All a are 33: low bits 0001, high bits 10.
    """
    codes = levels + 4
    # Weight 32 k + l has its third bit in bit k of byte l.
    high = np.packbits((codes >> 2).reshape(-1, 8, 32).astype(np.uint8), axis=1, bitorder="little")
    scales = np.array([0x11] * 8 + [0xAA] * 4, dtype=np.uint8)
    fixed = np.broadcast_to(scales, (len(codes), 12))
    return np.concatenate([high[:, 0], _quarters(codes & 3), fixed, scale], axis=1)


def _q4_k(levels: Array, scale: Array) -> Array:
    """Bytes d, d of minima, 12 of scales and minima by 32 weights, 128 of u; w = d (a u - m).

    All a are 1 and all m the zero, under 16: their upper 2 bits, in other bytes, are 0.
    """
    zero = _zero(levels)
    ones = np.ones((len(levels), 4), dtype=np.uint8)
    minima = np.repeat(zero.astype(np.uint8), 4, axis=1)
    codes = (levels + zero).reshape(-1, 4, 2, 32)  # 64 weights share 32 bytes
    packed = (codes[:, :, 0] | codes[:, :, 1] << 4).astype(np.uint8).reshape(-1, 128)
    return np.concatenate([scale, scale, ones, minima, ones | minima << 4, packed], axis=1)


def _quarters(codes: Array) -> Array:
    """(blocks, 256) of 2 bits to (blocks, 64): of 128 weights, weight 32 k + l in byte l."""
    split = codes.reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6]).reshape(1, 1, 4, 1)
    return np.bitwise_or.reduce(split << shifts, axis=2).astype(np.uint8).reshape(-1, 64)


def _zero(levels: Array) -> Array:
    """The least zero, (blocks, 1), that makes codes of all levels of a block."""
    return np.maximum(0, -levels.min(axis=1, keepdims=True))


def _between(low: int, high: int) -> Callable[[Array], bool]:
    return lambda levels: bool(levels.min() >= low and levels.max() <= high)


def _span(most: int) -> Callable[[Array], bool]:
    """Whether each block's levels are codes up to `most` with a zero among them."""

    def fits(levels: Array) -> bool:
        zero = _zero(levels)
        return bool(zero.max() <= most and (levels + zero).max() <= most)

    return fits


# The smallest first.
_TYPES = (
    _Type("tq2_0", SUPER, _tq2_0, _between(-2, 1)),
    _Type("q2_k", SUPER, _q2_k, _span(3)),
    _Type("q3_k", SUPER, _q3_k, _between(-4, 3)),
    _Type("q4_0", 32, _q4_0, _between(-8, 7)),
    _Type("q4_k", SUPER, _q4_k, _span(15)),
    _Type("q5_0", 32, _q5_0, _between(-16, 15)),
    _Type("q8_0", 32, _q8_0, _between(-128, 127)),
)
